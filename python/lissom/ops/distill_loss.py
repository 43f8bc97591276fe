"""``lissom::distill_loss``: KL and its variants, cross-entropy and entropy of two sets of logits, in one.

Numbers: ``reference/distill_loss.py``. The forward writes the gradient into one buffer as it goes; the
backward hands that buffer on, scaled in place where the loss was scaled. No softmax is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _cuda, _native, _triton, registry
from ..reference import distill_loss as _reference
from ..reference.distill_loss import DIVERGENCES, DistillOptions
from ._library import FLOAT_DTYPES, LIBRARY, check_float, register_gpu
from ._linear import flat_rows, kernel_rows

__all__ = ["REDUCTIONS", "check_distill_labels", "check_distill_options", "distill_loss", "distill_scales"]

_OP = "distill_loss"
_GRAD = "distill_loss_grad"

REDUCTIONS = ("batchmean", "mean", "sum", "none")

_OPTIONS = (
    "Tensor? labels, float temperature, float kl_weight, float ce_weight, float entropy_weight, "
    "str divergence, float js_beta, int ignore_index, float label_smoothing, float? softcap, "
    "float student_scale, float teacher_scale, str reduction"
)
LIBRARY.define(
    f"{_OP}(Tensor student_logits, Tensor? teacher_logits, {_OPTIONS}, bool with_grad, str? backend) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    f"{_GRAD}(Tensor grad_loss, Tensor student_logits, Tensor? teacher_logits, {_OPTIONS}, "
    "str? backend) -> Tensor"
)


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    entropy_weight: float = 0.0,
    divergence: str = "forward",
    js_beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """Distillation loss of a student's logits: T² · (kl_weight · D + entropy_weight · H) + ce_weight · CE.

    With the defaults this is
    ``F.kl_div(F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1), reduction="batchmean",
    log_target=True) * T**2`` of ``[rows, V]`` logits. The two published forms are KL + λ·H
    (``entropy_weight=λ``) and CE + KL (``ce_weight=1``).

    Args:
        student_logits: ``[..., V]``, float32, bfloat16 or float16; any strides and leading dimensions.
        teacher_logits: the same shape, any of these dtypes; never gets a gradient. May be None, and is not
            read, where ``kl_weight`` is 0.
        labels: int64 or int32 ``[...]``, in [0, V) or ``ignore_index``. May be None where ``ce_weight`` is 0.
        temperature: T > 0, divides both logits in D and in H; not in CE.
        kl_weight, ce_weight, entropy_weight: factors of D, of the cross-entropy with the labels and of the
            entropy H of the student's distribution. A term of weight 0 is not computed.
        divergence: D is ``"forward"``: KL(teacher ‖ student); ``"reverse"``: KL(student ‖ teacher); ``"js"``:
            β KL(teacher ‖ m) + (1 − β) KL(student ‖ m) with m = β teacher + (1 − β) student.
        js_beta: β in (0, 1) of ``"js"``.
        ignore_index: rows with this label count in no term, KL and entropy included, and get no gradient.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        softcap: logits z become ``softcap · tanh(z / softcap)``, after scaling; None leaves them.
        student_scale, teacher_scale: factors of the logits.
        reduction: ``"sum"``; ``"batchmean"``: the sum over the n rows that count (all without labels; ``[B,
            S, V]`` has B·S rows), divided by n; ``"mean"``: D and H divided by n·V, as ``F.kl_div`` has it,
            and CE by n; ``"none"``: a loss per row, ``[...]``.
        backend: ``"native"`` (CPU), ``"triton"``, ``"cuda"`` (CUDA) or ``"reference"``; None chooses.

    Returns:
        float32 scalar, or ``[...]`` for ``"none"``. Differentiable once, with respect to
        ``student_logits``: the gradient has their dtype. Where no row counts, the means are NaN, as torch's
        are, the sum is 0, and the gradient 0. NaN in a row, or a row of −inf only, makes that row's loss and
        gradient NaN. A logit of −inf is masked: 0 · log 0 is 0; where the teacher gives weight to what the
        student masks, forward KL is +inf, and reverse KL is where the student does to what the teacher masks.
        Computed from float32's exponentials with double sums: within 1e-6 of float64 (relative; of what is
        left after cancelling, within a unit in the last place of the probabilities). On the native backend
        the bits depend neither on the number of threads nor on the instruction set.

        On a GPU nothing waits for it: a row whose label is out of range is NaN there, loss and gradient.

        Beyond the gradient (a buffer like ``student_logits``, written in the forward), the memory taken is
        O(rows) on all backends but the reference; logits whose last dimension is not dense are copied.
        float16's gradient is computed in the backward instead, with the incoming gradient as a factor, so
        that loss scaling (``torch.amp.GradScaler``) keeps it from underflow.

    Raises:
        TypeError, ValueError: a dtype, shape, label or option that cannot be served, with the value and the
            fix.
        RuntimeError: differentiated twice, or under a ``torch.func`` transform.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{_OP}: torch.func transforms (grad, vmap, jvp, …) are not supported; use tensor.backward() or "
            "torch.autograd.grad, and reduction='none' for one loss per row"
        )
    # float16: see _distill_loss_grad. A teacher that requires grad must not make the loss require it.
    with_grad = torch.is_grad_enabled() and student_logits.requires_grad
    loss: Tensor
    loss, _ = torch.ops.lissom.distill_loss.default(
        student_logits,
        None if teacher_logits is None else teacher_logits.detach(),
        labels,
        temperature,
        kl_weight,
        ce_weight,
        entropy_weight,
        divergence,
        js_beta,
        ignore_index,
        label_smoothing,
        softcap,
        student_scale,
        teacher_scale,
        reduction,
        with_grad and student_logits.dtype is not torch.float16,
        backend,
    )
    return loss


# ------------------------------------------------------------------------------------------- checks


def check_distill_options(op: str, o: DistillOptions, reduction: str) -> None:
    """ValueError unless each option has a meaning."""
    if o.divergence not in DIVERGENCES:
        raise ValueError(f"{op}: divergence={o.divergence!r} is unknown; use one of {DIVERGENCES}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction={reduction!r} is unknown; use one of {REDUCTIONS}")
    if not 0 < o.temperature < math.inf:
        raise ValueError(
            f"{op}: temperature={o.temperature} must be positive and finite; 1.0 leaves logits as they are"
        )
    if o.softcap is not None and not 0 < o.softcap < math.inf:
        raise ValueError(f"{op}: softcap={o.softcap} must be positive and finite; use None for no cap")
    if o.divergence == "js" and not 0 < o.js_beta < 1:
        raise ValueError(
            f"{op}: js_beta={o.js_beta} must lie between 0 and 1; for the limits use divergence='forward' or "
            "'reverse'"
        )
    if not 0 <= o.label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing={o.label_smoothing} must be in [0, 1]; use 0.0 for none")
    for name in ("kl_weight", "ce_weight", "entropy_weight", "student_scale", "teacher_scale"):
        if not math.isfinite(getattr(o, name)):
            raise ValueError(
                f"{op}: {name}={getattr(o, name)} must be finite; 0.0 leaves a term out, 1.0 does not scale"
            )


def check_distill_labels(op: str, labels: Tensor | None, vocab: int, ignore_index: int) -> int | None:
    """How many labels count, None without labels.

    Raises:
        ValueError: one is neither in [0, vocab) nor ``ignore_index``, with its position.
    """
    if labels is None:
        return None
    if not labels.numel():
        return 0
    smallest, largest = (int(bound) for bound in labels.aminmax())
    if smallest >= 0 and largest < vocab and not smallest <= ignore_index <= largest:
        return labels.numel()  # the usual case, in one pass
    counted = labels != ignore_index
    wrong = (counted & ((labels < 0) | (labels >= vocab))).nonzero()
    if len(wrong):
        position = tuple(wrong[0].tolist())
        raise ValueError(
            f"{op}: labels[{', '.join(map(str, position))}] is {int(labels[position])}, which is not in "
            f"[0, {vocab}); give rows that do not count the label ignore_index={ignore_index}"
        )
    return int(counted.sum())


def count_labels(
    op: str, labels: Tensor | None, vocab: int, ignore_index: int, backend: registry.Backend, rows: int
) -> int | Tensor:
    """How many of ``rows`` rows count; for kernels on a GPU, which need not wait for it, a scalar there."""
    if labels is not None and labels.is_cuda and backend.name in ("triton", "cuda"):
        return (labels != ignore_index).sum()
    counted = check_distill_labels(op, labels, vocab, ignore_index)
    return rows if counted is None else counted


def distill_scales(reduction: str, rows: int | Tensor, vocab: int) -> tuple[Any, Any]:
    """The factors of KL and entropy, and of cross-entropy, where ``rows`` rows count; numbers, or, where
    ``rows`` is on a GPU, float64 scalars there."""
    if reduction in ("sum", "none"):
        return 1.0, 1.0
    if isinstance(rows, Tensor):
        mean: Any = rows.double().reciprocal()  # infinite where nothing counts: no row makes use of it
    else:
        mean = 1.0 / rows if rows else 0.0  # nothing counts: gradients are 0, and the loss is made NaN
    return (mean, mean) if reduction == "batchmean" else (mean / vocab, mean)


def reduced_loss(losses: Tensor, counted: int | Tensor, reduction: str) -> Tensor:
    """float64 losses of rows as the scalar of ``reduction``."""
    loss = losses.sum().float()
    if reduction == "sum":
        return loss
    if isinstance(counted, Tensor):
        return torch.where(counted > 0, loss, math.nan)
    return loss if counted else loss.fill_(math.nan)


def largest_factor(grad_loss: Tensor, reduction: str) -> Any:
    """Of incoming gradients, what gradients are multiplied by before they are rounded: the scalar, or of one
    per row the largest, by which the others are then at most 1. On a GPU a float64 scalar there."""
    if not grad_loss.is_cuda:
        if reduction != "none":
            return float(grad_loss)
        factor = float(grad_loss.abs().max()) if grad_loss.numel() else 1.0
        return factor if 0 < factor < math.inf else 1.0
    if reduction != "none":
        return grad_loss.double()
    if not grad_loss.numel():
        return 1.0
    largest = grad_loss.abs().amax().double()
    return torch.where((largest > 0) & (largest < math.inf), largest, 1.0)


def _check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(
            f"{_OP}: {name} is on {tensor.device} but student_logits is on {student.device}; use "
            f"{name}.to(student_logits.device)"
        )


def _check(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    entropy_weight: float,
    divergence: str,
    js_beta: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    student_scale: float,
    teacher_scale: float,
    reduction: str,
) -> DistillOptions:
    """The options as one record; raises unless all fits, but looks at no label."""
    o = DistillOptions(
        temperature,
        kl_weight,
        ce_weight,
        entropy_weight,
        divergence,
        js_beta,
        ignore_index,
        label_smoothing,
        softcap,
        student_scale,
        teacher_scale,
    )
    if student.dtype not in FLOAT_DTYPES:
        check_float(_OP, "student_logits", student.dtype)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(
            f"{_OP}: student_logits has shape {tuple(student.shape)}; it must be [..., V], V at least 1"
        )
    check_distill_options(_OP, o, reduction)
    if teacher is not None:
        _check_teacher(student, teacher)
    elif kl_weight:
        raise ValueError(
            f"{_OP}: teacher_logits is None but kl_weight={kl_weight}; give the teacher's "
            "logits, or kl_weight=0"
        )
    if labels is not None:
        _check_device("labels", labels, student)
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{_OP}: labels has dtype {labels.dtype}; use torch.int64 (labels.long())")
        if labels.shape != student.shape[:-1]:
            raise ValueError(
                f"{_OP}: labels has shape {tuple(labels.shape)} but student_logits {tuple(student.shape)}; "
                f"it must be {tuple(student.shape[:-1])}: one label per row"
            )
    elif ce_weight:
        raise ValueError(f"{_OP}: labels is None but ce_weight={ce_weight}; give labels, or ce_weight=0")
    return o


def _check_teacher(student: Tensor, teacher: Tensor) -> None:
    _check_device("teacher_logits", teacher, student)
    if teacher.dtype not in FLOAT_DTYPES:
        check_float(_OP, "teacher_logits", teacher.dtype)
    if teacher.shape == student.shape:
        return
    if teacher.dim() and teacher.shape[-1] != student.shape[-1]:
        own, others = student.shape[-1], teacher.shape[-1]
        larger = "teacher_logits" if others > own else "student_logits"
        raise ValueError(
            f"{_OP}: student_logits has a vocabulary of {own} but teacher_logits of {others}; teacher and "
            "student have different vocabularies or one is padded: slice or pad the logits, for example "
            f"{larger}[..., :{min(own, others)}]"
        )
    raise ValueError(
        f"{_OP}: student_logits has shape {tuple(student.shape)} but teacher_logits {tuple(teacher.shape)}; "
        "they must be the same"
    )


# ------------------------------------------------------------------------------------------- backends


def _rows_native(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    o: DistillOptions,
    term_scale: float,
    ce_scale: float,
    grad: Tensor | None,
) -> Tensor:
    """Losses of ``student`` [R, V], float64 [R]; writes the gradient into ``grad`` [R, V], dense rows."""
    # Names, not temporaries: an address outlives no tensor.
    s, s_stride = kernel_rows(student)
    t, t_stride = (None, 0) if teacher is None else kernel_rows(teacher)
    y = None if labels is None else labels.to(torch.int64).contiguous()
    rows, vocab = s.shape
    loss = torch.empty(rows, dtype=torch.float64, device="cpu")
    _native.load().distill_loss(
        s.data_ptr(),
        _native.DTYPES[s.dtype],
        s_stride,
        0 if t is None else t.data_ptr(),
        0 if t is None else _native.DTYPES[t.dtype],
        t_stride,
        0 if y is None else y.data_ptr(),
        rows,
        vocab,
        o.temperature,
        o.kl_weight,
        o.ce_weight,
        o.entropy_weight,
        DIVERGENCES.index(o.divergence),
        o.js_beta,
        o.ignore_index,
        o.label_smoothing,
        o.softcap or 0.0,
        o.student_scale,
        o.teacher_scale,
        term_scale,
        ce_scale,
        loss.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else _native.DTYPES[grad.dtype],
        0 if grad is None else grad.stride(0),
        torch.get_num_threads(),
    )
    return loss


def _rows_reference(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    o: DistillOptions,
    term_scale: float,
    ce_scale: float,
    grad: Tensor | None,
) -> Tensor:
    loss, slope = _reference.row_losses(student, teacher, labels, o, term_scale=term_scale, ce_scale=ce_scale)
    if grad is not None:
        grad.copy_(slope)
    return loss


def _rows_triton(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    o: DistillOptions,
    term_scale: float | Tensor,
    ce_scale: float | Tensor,
    grad: Tensor | None,
) -> Tensor:
    losses: Tensor = _triton.load(_OP).distill_loss(
        student, teacher, labels, term_scale, ce_scale, grad, **vars(o)
    )
    return losses


def _rows_cuda(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    o: DistillOptions,
    term_scale: float | Tensor,
    ce_scale: float | Tensor,
    grad: Tensor | None,
) -> Tensor:
    """As ``_rows_native``; the factors may be float64 scalars on the device."""
    # Names, not temporaries: an address outlives no tensor.
    s, s_stride = kernel_rows(student)
    t, t_stride = (None, 0) if teacher is None else kernel_rows(teacher)
    y = None if labels is None else labels.contiguous()
    scales = None
    if isinstance(term_scale, Tensor) and isinstance(ce_scale, Tensor):
        scales = torch.stack([term_scale, ce_scale])
        term_scale = ce_scale = 1.0
    rows, vocab = s.shape
    module = _cuda.load()
    args = module.DistillLoss(
        student=module.DistillLogits(s.data_ptr(), _native.DTYPES[s.dtype], s_stride, o.student_scale),
        teacher=module.DistillLogits(
            0 if t is None else t.data_ptr(),
            0 if t is None else _native.DTYPES[t.dtype],
            t_stride,
            o.teacher_scale,
        ),
        labels=0 if y is None else y.data_ptr(),
        wide_labels=y is not None and y.dtype is torch.int64,
        rows=rows,
        vocab=vocab,
        ignore_index=o.ignore_index,
        divergence=0 if t is None else 1 + DIVERGENCES.index(o.divergence),
        temperature=o.temperature,
        kl_weight=o.kl_weight,
        ce_weight=o.ce_weight,
        entropy_weight=o.entropy_weight,
        js_beta=o.js_beta,
        label_smoothing=o.label_smoothing,
        softcap=o.softcap or 0.0,
        term_scale=term_scale,
        ce_scale=ce_scale,
        scales=0 if scales is None else scales.data_ptr(),
        grad=0 if grad is None else grad.data_ptr(),
        grad_stride=0 if grad is None else grad.stride(0),
    )
    parts, fields = _cuda.call("distill_plan", s, args)
    loss = s.new_empty((rows, parts), dtype=torch.float64)
    partials = s.new_empty(rows * parts * fields, dtype=torch.float64)
    _cuda.call("distill_loss", s, args, loss.data_ptr(), partials.data_ptr())
    return loss.view(rows) if parts == 1 else loss.sum(1)


def _prepare(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    options: tuple[Any, ...],
    backend: str | None,
) -> tuple[Callable[..., Tensor], tuple[Any, ...], int | Tensor]:
    """The backend's function, its arguments but for the last three, and how many rows count."""
    o = _check(student, teacher, labels, *options)
    chosen = registry.select(_OP, student.device.type, backend)
    rows = flat_rows(student)
    counted = count_labels(_OP, labels, rows.shape[1], o.ignore_index, chosen, rows.shape[0])
    if not o.kl_weight:
        teacher = None
    args = (
        rows,
        None if teacher is None else flat_rows(teacher),
        None if labels is None else labels.reshape(-1),
        o,
    )
    return chosen.run, args, counted


def _distill_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    *options, with_grad, backend = options  # type: ignore[assignment]
    reduction = options[-1]
    run, args, counted = _prepare(student, teacher, labels, tuple(options), backend)
    grad = student.new_empty(student.shape if with_grad else 0)
    scales = distill_scales(reduction, counted, student.shape[-1])
    losses = run(*args, *scales, flat_rows(grad) if with_grad else None)
    if reduction == "none":
        return losses.view(student.shape[:-1]).float(), grad
    return reduced_loss(losses, counted, reduction), grad


def _distill_loss_grad(
    grad_loss: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor | None, *options: Any
) -> Tensor:
    """The gradient, ``grad_loss`` a factor before it is rounded to the student's dtype."""
    *options, backend = options  # type: ignore[assignment]
    reduction = options[-1]
    run, args, counted = _prepare(student, teacher, labels, tuple(options), backend)
    grad = student.new_empty(student.shape)
    factor = largest_factor(grad_loss, reduction)
    term_scale, ce_scale = distill_scales(reduction, counted, student.shape[-1])
    run(*args, term_scale * factor, ce_scale * factor, flat_rows(grad))
    if reduction == "none":
        _scale_rows(grad, grad_loss / factor)
    return grad


def _scale_rows(grad: Tensor, factor: Tensor) -> None:
    """``grad`` [..., V] times ``factor`` [...], or a scalar on a GPU, in place, in float32."""
    rows, factors = flat_rows(grad), factor.reshape(-1, 1)
    if grad.is_cuda:
        if _triton.unavailable_reason():
            rows.mul_(factors)
        else:  # a factor of 1 is found there, and leaves the rows unread
            _triton.load(_OP).scale_rows(rows, factor.reshape(-1) if factor.dim() else factor)
        return
    if bool((factor == 1.0).all()):
        return
    step = max(1, 2**14 // rows.shape[1])  # what is cast to float32 stays in the cache
    for piece, by in zip(rows.split(step), factors.split(step), strict=True):
        piece.mul_(by)


# ------------------------------------------------------------------------------------------- fakes


def _fake_distill_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    *options, with_grad, _ = options  # type: ignore[assignment]
    _check(student, teacher, labels, *options)
    shape = student.shape[:-1] if options[-1] == "none" else ()
    loss = student.new_empty(shape, dtype=torch.float32)
    return loss, student.new_empty(student.shape if with_grad else 0)


def _fake_distill_loss_grad(
    grad_loss: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor | None, *options: Any
) -> Tensor:
    _check(student, teacher, labels, *options[:-1])
    return student.new_empty(student.shape)


# ------------------------------------------------------------------------------------------- autograd


class _DistillLoss(torch.autograd.Function):
    """As ``torch.library.register_autograd`` makes one, which reads the schema anew in each call: 55 µs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss, grad = _below_autograd(*inputs)
        student, teacher, labels, *options, with_grad, backend = inputs
        ctx.options = (*options, backend)
        # Not saved as an output: it is changed in place once, and then it is whose it was handed to.
        ctx.buffer = grad if with_grad and ctx.needs_input_grad[0] else None
        ctx.mark_non_differentiable(grad)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, labels)
        return loss, grad

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = [None] * (len(ctx.options) + 3)
        buffer, ctx.buffer = ctx.buffer, None
        if grad_loss is None or not ctx.needs_input_grad[0]:
            return (None, *nothing)
        # create_graph=True takes the op, whose own backward says that there is none.
        if buffer is not None and not torch.is_grad_enabled():
            return (_scaled(buffer, grad_loss), *nothing)
        del buffer
        grad = torch.ops.lissom.distill_loss_grad.default(grad_loss, *ctx.saved_tensors, *ctx.options)
        return (grad, *nothing)


def _below_autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        loss, grad = torch.ops.lissom.distill_loss.default(*inputs)
    return loss, grad


def _autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:2]):
        loss, grad = _DistillLoss.apply(*inputs)
        return loss, grad
    return _below_autograd(*inputs)


def _scaled(buffer: Tensor, factor: Tensor) -> Tensor:
    """``buffer`` [..., V] times ``factor``, [...] or a scalar; the buffer itself, but where it is traced."""
    if type(buffer) is not Tensor:
        return (buffer * (factor.unsqueeze(-1) if factor.dim() else factor)).to(buffer.dtype)
    if factor.dim() or buffer.is_cuda:
        _scale_rows(buffer, factor)
    elif (by := float(factor)) != 1.0:
        buffer.mul_(by)
    return buffer


def _grad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        f"{_OP}: double backward is not supported: the loss can be differentiated once; write it with "
        "torch.nn.functional.log_softmax and kl_div where second derivatives are needed"
    )


LIBRARY.impl(_OP, _distill_loss, "CompositeExplicitAutograd")
LIBRARY.impl(_OP, _autograd, "Autograd")
LIBRARY.impl(_GRAD, _distill_loss_grad, "CompositeExplicitAutograd")
torch.library.register_fake(f"lissom::{_OP}", _fake_distill_loss, lib=LIBRARY)
torch.library.register_fake(f"lissom::{_GRAD}", _fake_distill_loss_grad, lib=LIBRARY)
torch.library.register_autograd(f"lissom::{_GRAD}", _grad_backward, setup_context=_grad_context, lib=LIBRARY)
registry.register(
    _OP,
    "cpu",
    registry.Backend("native", _rows_native, _native.unavailable_reason, _native.isa),
    registry.Backend(registry.REFERENCE, _rows_reference),
)


def _cuda_is_faster(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    o: DistillOptions,
    *_: Any,
) -> bool:
    """Not beyond what was measured on an H200 (bench/results/gpu-nvidia-h200.md): forward KL of 8192 rows of
    bfloat16 logits, 1.16 times Triton's speed at 32000 columns, 1.12 at 128256."""
    return (
        o.divergence == "forward"
        and teacher is not None
        and labels is None
        and not (o.entropy_weight or o.softcap)
        and student.dtype == teacher.dtype == torch.bfloat16
        and student.shape[0] >= 8192
        and student.shape[1] >= 32000
    )


register_gpu(_OP, _rows_triton, _rows_reference, _rows_cuda, _cuda_is_faster)
