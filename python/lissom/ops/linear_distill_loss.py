"""``lissom::linear_distill_loss``: ``distill_loss`` from hidden states, some rows' logits at a time.

Numbers: ``reference/linear_distill_loss.py``. Per chunk of rows: the products by torch into buffers that all
chunks share, the loss by ``distill_loss``'s kernels with the gradient written over the student's logits, then
the gradients of hidden states, weight and bias from there. ``[tokens, vocabulary]`` is never held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton, registry
from ..reference import distill_loss as _reference
from ..reference.distill_loss import DistillOptions
from ._library import FLOAT_DTYPES, LIBRARY, check_float, register_gpu
from ._linear import flat_rows, kernel_rows
from .distill_loss import (
    _OPTIONS,
    _rows_native,
    _rows_triton,
    _scale_rows,
    _scaled,
    check_distill_options,
    count_labels,
    distill_scales,
    largest_factor,
    reduced_loss,
)

__all__ = ["CHUNK_BYTES", "CHUNK_SHARE", "linear_distill_loss"]

_OP = "linear_distill_loss"
_GRAD = "linear_distill_loss_grad"

CHUNK_BYTES = 128 << 20
"""Most bytes that the logits of a chunk take where no ``memory_budget`` is given …"""

CHUNK_SHARE = 0.16
"""… or this share of all logits, if that is less …"""

CHUNK_LEAST_BYTES = 4 << 20
"""… but not below this, where matrix products would be of a few rows only."""

CHUNK_BYTES_GPU, CHUNK_LEAST_BYTES_GPU = 512 << 20, 64 << 20
"""The same on a GPU, where a product must be of a thousand rows or so to be worth the weights that it reads:
1 GB where 128256 words have 4096 features in bfloat16."""

REFERENCE_ELEMENTS = 1 << 20
"""Logits whose float64 copies the reference backend holds at once; it holds about ten."""

_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits, Tensor? topk_log_probs, "
    "Tensor? topk_indices"
)
_TENSOR_COUNT = 10
"""Those, and the labels."""

_HOW = "int? memory_budget, bool grad_hidden, bool grad_weight, bool grad_bias, str? backend"
LIBRARY.define(f"{_OP}({_TENSORS}, {_OPTIONS}, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"{_GRAD}(Tensor grad_loss, {_TENSORS}, {_OPTIONS}, {_HOW}) -> (Tensor, Tensor, Tensor)")


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    labels: Tensor | None = None,
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
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`lissom.ops.distill_loss` of a linear layer's outputs, some rows of them at a time.

    The student's logits are ``student_hidden · student_weightᵀ + student_bias``, and ``[tokens, V]`` is never
    held. The teacher is given in one of three forms, and is not needed where ``kl_weight`` is 0.

    Args:
        student_hidden: ``[..., K]``, float32, bfloat16 or float16; any strides and leading dimensions.
        student_weight: ``[V, K]`` of the same dtype: the output layer, or the tied embedding.
        student_bias: ``[V]`` of the same dtype, or None.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's ``[..., K']``, ``[V, K']`` and ``[V]`` or
            None, of one dtype, which may differ from the student's. The leading dimensions are the student's.
        teacher_logits: ``[..., V]``.
        teacher_topk: log-probabilities ``[..., k]`` at temperature T, and their places int64 or int32
            ``[..., k]`` in [0, V): the teacher's k largest, as stored by an earlier run. The divergence is
            Σ_k q_k (log q_k − log p[i_k]) over those, what is missing from 1 left out; ``"forward"`` only.
        labels: int64 or int32 ``[...]``, in [0, V) or ``ignore_index``. May be None where ``ce_weight`` is 0.
        temperature, kl_weight, ce_weight, entropy_weight, divergence, js_beta, ignore_index,
            label_smoothing, softcap, student_scale, teacher_scale, reduction: as in ``distill_loss``.
        memory_budget: bytes for the logits of the rows that are worked on at once, the student's and those
            that are made from ``teacher_hidden``; at least one row is. None: 16 % of all of them, at least 4
            and at most 128 MiB (on a GPU 64 and 512). The result depends on it in the last bits only.
        backend: ``"native"`` (CPU), ``"triton"`` (CUDA) or ``"reference"``; None chooses. The products are
            torch's on each.

    Returns:
        float32 scalar, or ``[...]`` for ``reduction="none"``. Differentiable once with respect to
        ``student_hidden``, ``student_weight`` and ``student_bias``; what does not require grad costs nothing,
        and teachers never get a gradient. Logits, and their gradient, are rounded to the student's dtype as
        those of a linear layer are; over chunks, the weight's gradient is summed in the weight's dtype (as
        gradient accumulation does) and the bias's in float32. Losses and gradients that are not finite: as in
        ``distill_loss``; one such row makes the gradients of weight and bias NaN, as it does anywhere.

        The forward computes the gradients too, and the backward scales them in place. With
        ``reduction="none"`` and in float16, where factors must come before the rounding, and in a second
        backward under ``retain_graph`` they are computed in the backward: once more the products for the
        logits. Under autocast, hidden states, weights and biases are cast as ``F.linear`` does it.

    Raises:
        TypeError, ValueError: a dtype, shape, label, index or option that cannot be served, with the value
            and the fix.
        RuntimeError: differentiated twice, or under a ``torch.func`` transform.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{_OP}: torch.func transforms (grad, vmap, jvp, …) are not supported; use tensor.backward() or "
            "torch.autograd.grad, and reduction='none' for one loss per row"
        )
    log_probs, indices = (None, None) if teacher_topk is None else _pair(teacher_topk)
    student = _autocast((student_hidden, student_weight, student_bias))
    teacher = _autocast((teacher_hidden, teacher_weight, teacher_bias))
    grads = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    if reduction == "none" or student[0].dtype is torch.float16:  # type: ignore[union-attr]
        grads = [False] * 3
    loss: Tensor
    loss, *_ = torch.ops.lissom.linear_distill_loss.default(
        *student,
        *(None if x is None else x.detach() for x in (*teacher, teacher_logits, log_probs)),
        indices,
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
        memory_budget,
        *grads,
        backend,
    )
    return loss


def _pair(topk: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(topk, tuple | list) or len(topk) != 2 or not all(isinstance(x, Tensor) for x in topk):
        raise TypeError(
            f"{_OP}: teacher_topk must be (log_probs, indices), two tensors such as log_probs.topk(k) gives; "
            f"got {type(topk).__name__}"
        )
    return topk[0], topk[1]


def _autocast(layer: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What ``F.linear`` would be given under autocast."""
    hidden = layer[0]
    if hidden is None or hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type):
        return layer
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return tuple(None if x is None else x.to(dtype) if x.dtype in FLOAT_DTYPES else x for x in layer)


# ------------------------------------------------------------------------------------------- checks


@dataclass(frozen=True)
class _Problem:
    """Checked arguments; rows flat, what is not needed None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: tuple[Tensor, Tensor, Tensor | None] | None
    teacher_logits: Tensor | None
    topk: tuple[Tensor, Tensor] | None
    labels: Tensor | None
    options: DistillOptions
    reduction: str
    memory_budget: int | None
    leading: torch.Size

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def chunk_rows(self) -> int:
        """Rows whose logits fit into the budget, evenly shared among the chunks."""
        row = self.vocab * self.hidden.element_size()
        if self.teacher is not None:
            row += self.vocab * self.teacher[0].element_size()
        budget = self.memory_budget
        if budget is None:
            gpu = self.hidden.is_cuda
            most, least = (
                (CHUNK_BYTES_GPU, CHUNK_LEAST_BYTES_GPU) if gpu else (CHUNK_BYTES, CHUNK_LEAST_BYTES)
            )
            budget = min(most, max(least, int(CHUNK_SHARE * row * self.rows)))
        most = max(1, budget // row)
        return max(1, -(-self.rows // max(1, -(-self.rows // most))))


def _check_layer(
    whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, device: torch.device
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        _check_device(f"{whose}_{name}", tensor, device)
        check_float(_OP, f"{whose}_{name}", tensor.dtype)
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{_OP}: {whose}_hidden is {hidden.dtype} but {whose}_{name} {tensor.dtype}; they must be "
                f"the same, for example {whose}_{name}.to({hidden.dtype})"
            )
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{_OP}: {whose}_weight has shape {tuple(weight.shape)}; it must be [V, K], V at least 1"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{_OP}: {whose}_hidden has shape {tuple(hidden.shape)} but {whose}_weight is "
            f"[V={weight.shape[0]}, K={weight.shape[1]}]; the last dimension of {whose}_hidden must be "
            f"{weight.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_OP}: {whose}_bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{_OP}: {name} is on {tensor.device} but student_hidden is on {device}; use "
            f"{name}.to(student_hidden.device)"
        )


def _check_leading(name: str, tensor: Tensor, leading: torch.Size, last: str = "") -> None:
    """``tensor`` must have the student's leading dimensions, and one more where that has a name."""
    if tensor.dim() != len(leading) + bool(last) or tensor.shape[: len(leading)] != leading:
        sizes = ", ".join([*map(str, leading), *([last] if last else [])])
        raise ValueError(
            f"{_OP}: {name} has shape {tuple(tensor.shape)}; it must be [{sizes}], with the leading "
            "dimensions of student_hidden"
        )


def _check_vocabulary(given: str, others: int, own: int) -> None:
    if others != own:
        larger = "teacher" if others > own else "student"
        raise ValueError(
            f"{_OP}: student_weight has a vocabulary of {own} but {given} of {others}; teacher and student "
            f"have different vocabularies or one is padded: slice or pad the {larger}'s weight (and bias) or "
            f"logits, for example to [:{min(own, others)}]"
        )


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    log_probs: Tensor | None,
    indices: Tensor | None,
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
    memory_budget: int | None,
) -> _Problem:
    """The arguments as one record; raises unless all fits, but looks at no label or index."""
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
    device, leading = student_hidden.device, student_hidden.shape[:-1]
    _check_layer("student", student_hidden, student_weight, student_bias, device)
    check_distill_options(_OP, o, reduction)
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(
            f"{_OP}: memory_budget={memory_budget} must be positive: bytes for the logits of a chunk; None "
            "chooses"
        )
    vocab = student_weight.shape[0]
    forms = {
        "teacher_hidden": teacher_hidden,
        "teacher_logits": teacher_logits,
        "teacher_topk": log_probs,
    }
    given = [name for name, tensor in forms.items() if tensor is not None]
    if len(given) > 1:
        raise ValueError(f"{_OP}: {' and '.join(given)} are given; a teacher comes in one of the forms")
    if kl_weight and not given:
        raise ValueError(
            f"{_OP}: there is no teacher but kl_weight={kl_weight}; give teacher_hidden and teacher_weight, "
            "teacher_logits or teacher_topk, or kl_weight=0"
        )
    if (teacher_hidden is None) != (teacher_weight is None) or (
        teacher_bias is not None and teacher_hidden is None
    ):
        raise ValueError(
            f"{_OP}: teacher_hidden and teacher_weight belong together, and teacher_bias to both; "
            f"{'teacher_weight' if teacher_weight is None else 'teacher_hidden'} is None"
        )
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        _check_layer("teacher", teacher_hidden, teacher_weight, teacher_bias, device)
        _check_leading("teacher_hidden", teacher_hidden, leading, "K'")
        _check_vocabulary("teacher_weight", teacher_weight.shape[0], vocab)
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
    if teacher_logits is not None:
        _check_device("teacher_logits", teacher_logits, device)
        check_float(_OP, "teacher_logits", teacher_logits.dtype)
        if teacher_logits.dim():
            _check_vocabulary("teacher_logits", teacher_logits.shape[-1], vocab)
        _check_leading("teacher_logits", teacher_logits, leading, "V")
    topk = None
    if log_probs is not None and indices is not None:
        _check_topk(log_probs, indices, leading, device, divergence)
        topk = (log_probs, indices)
    if labels is not None:
        _check_device("labels", labels, device)
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{_OP}: labels has dtype {labels.dtype}; use torch.int64 (labels.long())")
        _check_leading("labels", labels, leading)
    elif ce_weight:
        raise ValueError(f"{_OP}: labels is None but ce_weight={ce_weight}; give labels, or ce_weight=0")
    if not kl_weight:
        teacher = teacher_logits = topk = None
    return _Problem(
        flat_rows(student_hidden),
        student_weight,
        student_bias,
        None if teacher is None else (flat_rows(teacher[0]), *teacher[1:]),
        None if teacher_logits is None else flat_rows(teacher_logits),
        None if topk is None else (flat_rows(topk[0]), flat_rows(topk[1])),
        None if labels is None else labels.reshape(-1),
        o,
        reduction,
        memory_budget,
        leading,
    )


def _check_topk(
    log_probs: Tensor, indices: Tensor, leading: torch.Size, device: torch.device, divergence: str
) -> None:
    for name, tensor in (("log_probs", log_probs), ("indices", indices)):
        _check_device(f"teacher_topk's {name}", tensor, device)
    check_float(_OP, "teacher_topk's log_probs", log_probs.dtype)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{_OP}: teacher_topk's indices has dtype {indices.dtype}; use torch.int64 (indices.long())"
        )
    if log_probs.shape != indices.shape or log_probs.dim() == 0:
        raise ValueError(
            f"{_OP}: teacher_topk's log_probs has shape {tuple(log_probs.shape)} but indices "
            f"{tuple(indices.shape)}; both must be [..., k]"
        )
    _check_leading("teacher_topk", log_probs, leading, "k")
    if divergence != "forward":
        raise ValueError(
            f"{_OP}: divergence={divergence!r} needs all of the teacher's logits; with teacher_topk use "
            "divergence='forward'"
        )


def _check_indices(indices: Tensor, vocab: int, leading: torch.Size) -> None:
    if not indices.numel():
        return
    smallest, largest = (int(bound) for bound in indices.aminmax())
    if smallest >= 0 and largest < vocab:
        return
    every = indices.view(*leading, indices.shape[-1])
    position = tuple(((every < 0) | (every >= vocab)).nonzero()[0].tolist())
    raise ValueError(
        f"{_OP}: teacher_topk's indices[{', '.join(map(str, position))}] is {int(every[position])}, which is "
        f"not in [0, {vocab}): the teacher's vocabulary is another, or the indices are of another tensor"
    )


# ------------------------------------------------------------------------------------------- backends


def _chunk_native(
    student: Tensor,
    teacher: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    labels: Tensor | None,
    o: DistillOptions,
    term_scale: float,
    ce_scale: float,
    grad: Tensor | None,
) -> Tensor:
    """Losses of ``student`` [R, V], float64 [R]; the gradient goes to ``grad``, which may be ``student``."""
    if topk is None:
        return _rows_native(student, teacher, labels, o, term_scale, ce_scale, grad)
    # Names, not temporaries: an address outlives no tensor.
    s, stride = kernel_rows(student)
    log_probs, indices = topk[0].float().contiguous(), topk[1].long().contiguous()
    y = None if labels is None else labels.to(torch.int64).contiguous()
    rows, vocab = s.shape
    loss = torch.empty(rows, dtype=torch.float64, device="cpu")
    _native.load().distill_topk(
        s.data_ptr(),
        _native.DTYPES[s.dtype],
        stride,
        rows,
        vocab,
        log_probs.data_ptr(),
        indices.data_ptr(),
        indices.shape[1],
        0 if y is None else y.data_ptr(),
        o.temperature,
        o.kl_weight,
        o.ce_weight,
        o.entropy_weight,
        o.ignore_index,
        o.label_smoothing,
        o.softcap or 0.0,
        o.student_scale,
        term_scale,
        ce_scale,
        loss.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else _native.DTYPES[grad.dtype],
        0 if grad is None else grad.stride(0),
        torch.get_num_threads(),
    )
    return loss


def _chunk_triton(
    student: Tensor,
    teacher: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    labels: Tensor | None,
    o: DistillOptions,
    term_scale: float | Tensor,
    ce_scale: float | Tensor,
    grad: Tensor | None,
) -> Tensor:
    if topk is None:
        return _rows_triton(student, teacher, labels, o, term_scale, ce_scale, grad)
    losses: Tensor = _triton.load("distill_loss").distill_loss(
        student, None, labels, term_scale, ce_scale, grad, topk=topk, **vars(o)
    )
    return losses


def _chunk_reference(
    student: Tensor,
    teacher: Tensor | None,
    topk: tuple[Tensor, Tensor] | None,
    labels: Tensor | None,
    o: DistillOptions,
    term_scale: float,
    ce_scale: float,
    grad: Tensor | None,
) -> Tensor:
    losses = []
    step = max(1, REFERENCE_ELEMENTS // student.shape[1])
    for start in range(0, student.shape[0], step):
        part = slice(start, start + step)
        loss, slope = _reference.row_losses(
            student[part],
            None if teacher is None else teacher[part],
            None if labels is None else labels[part],
            o,
            topk=None if topk is None else (topk[0][part], topk[1][part]),
            term_scale=term_scale,
            ce_scale=ce_scale,
        )
        if grad is not None:
            grad[part] = slope
        losses.append(loss)
    return torch.cat(losses)


# ------------------------------------------------------------------------------------------- the ops


def _problem(args: tuple[Any, ...]) -> tuple[_Problem, list[bool], Callable[..., Tensor], int | Tensor]:
    """The checked arguments, which gradients, the backend's function, and how many rows count."""
    *plain, grad_hidden, grad_weight, grad_bias, backend = args
    problem = _check(*plain)
    chosen = registry.select(_OP, problem.hidden.device.type, backend)
    ignore_index = problem.options.ignore_index
    counted = count_labels(_OP, plain[9], problem.vocab, ignore_index, chosen, problem.rows)
    if problem.topk is not None and not (problem.hidden.is_cuda and chosen.name == "triton"):
        _check_indices(problem.topk[1], problem.vocab, problem.leading)
    return problem, [grad_hidden, grad_weight, grad_bias], chosen.run, counted


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _add_rows(total: Tensor, rows: Tensor) -> None:
    """Adds the sum of ``rows`` [R, V] to float32 ``total`` [V]; a few at a time where torch casts them."""
    whole = rows.is_cuda or rows.dtype is torch.float32
    step = rows.shape[0] if whole else max(1, 2**18 // rows.shape[1])
    for piece in rows.split(step):
        total += piece.sum(0, dtype=torch.float32)


def _solve(
    p: _Problem,
    needed: list[bool],
    run: Callable[..., Tensor],
    scales: tuple[Any, Any],
    factors: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Losses float64 [R], and the gradients of their sum; those that are not needed have no elements.

    ``factors`` [R], at most 1 each: multiply the rows' gradients.
    """
    rows, step = p.rows, p.chunk_rows()
    losses = torch.empty(rows, dtype=torch.float64, device=p.hidden.device)
    grad_hidden = p.hidden.new_empty(p.hidden.shape if needed[0] else 0)
    grad_weight = p.weight.new_empty(p.weight.shape if needed[1] else 0)
    grad_bias = p.weight.new_zeros(p.vocab if needed[2] else 0, dtype=torch.float32)
    if not rows:
        grad_weight.zero_()
    with torch.autocast(p.hidden.device.type, enabled=False):
        students = p.hidden.new_empty((step, p.vocab))
        teachers = None if p.teacher is None else p.teacher[0].new_empty((step, p.vocab))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            size, hidden = part.stop - start, p.hidden[part]
            logits = _logits(hidden, p.weight, p.bias, students[:size])
            teacher = None if p.teacher_logits is None else p.teacher_logits[part]
            if p.teacher is not None and teachers is not None:
                teacher = _logits(p.teacher[0][part], *p.teacher[1:], teachers[:size])
            losses[part] = run(
                logits,
                teacher,
                None if p.topk is None else (p.topk[0][part], p.topk[1][part]),
                None if p.labels is None else p.labels[part],
                p.options,
                *scales,
                logits if any(needed) else None,
            )
            if factors is not None:
                _scale_rows(logits, factors[part])
            if needed[0]:
                torch.mm(logits, p.weight, out=grad_hidden[part])
            if needed[1] and start == 0:
                torch.mm(logits.t(), hidden, out=grad_weight)
            elif needed[1]:
                grad_weight.addmm_(logits.t(), hidden)
            if needed[2]:
                _add_rows(grad_bias, logits)
    if needed[0]:
        grad_hidden = grad_hidden.view(*p.leading, p.hidden.shape[1])
    return losses, [grad_hidden, grad_weight, grad_bias.to(p.weight.dtype)]


def _linear_distill_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, needed, run, counted = _problem(args)
    losses, gradients = _solve(p, needed, run, distill_scales(p.reduction, counted, p.vocab))
    if p.reduction == "none":
        loss = losses.view(p.leading).float()
    else:
        loss = reduced_loss(losses, counted, p.reduction)
    return loss, gradients[0], gradients[1], gradients[2]


def _linear_distill_loss_grad(grad_loss: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, ``grad_loss`` a factor before the logits' gradient is rounded."""
    p, needed, run, counted = _problem(args)
    factor = largest_factor(grad_loss, p.reduction)
    factors = grad_loss.reshape(-1) / factor if p.reduction == "none" else None
    term_scale, ce_scale = distill_scales(p.reduction, counted, p.vocab)
    _, gradients = _solve(p, needed, run, (term_scale * factor, ce_scale * factor), factors)
    return gradients[0], gradients[1], gradients[2]


# ------------------------------------------------------------------------------------------- fakes


def _fake_linear_distill_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, reduction = args[0], args[-6]
    shape = hidden.shape[:-1] if reduction == "none" else ()
    loss = hidden.new_empty(shape, dtype=torch.float32)
    return loss, *_fake_linear_distill_loss_grad(loss, *args)


def _fake_linear_distill_loss_grad(grad_loss: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *plain, grad_hidden, grad_weight, grad_bias, _ = args
    _check(*plain)
    hidden, weight = plain[:2]
    return (
        hidden.new_empty(hidden.shape if grad_hidden else 0),
        weight.new_empty(weight.shape if grad_weight else 0),
        weight.new_empty(weight.shape[0] if grad_bias else 0),
    )


# ------------------------------------------------------------------------------------------- autograd


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (*options, grad_hidden, grad_weight, grad_bias, backend) = (
        inputs[:_TENSOR_COUNT],
        inputs[_TENSOR_COUNT:],
    )
    ctx.options, ctx.backend = options, backend
    # Not saved as outputs: they are changed in place once, and then they are whose they were handed to.
    made = (grad_hidden, grad_weight, grad_bias)
    ctx.buffers = [
        buffer if there and needed else None
        for buffer, there, needed in zip(output[1:], made, ctx.needs_input_grad, strict=False)
    ]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = [None] * (_TENSOR_COUNT - 3 + len(ctx.options) + 4)
    buffers, ctx.buffers = ctx.buffers, [None] * 3
    needed = [bool(n) for n in ctx.needs_input_grad[:3]]
    if grad_loss is None or not any(needed):
        return (None, None, None, *nothing)
    # create_graph=True takes the op, whose own backward says that there is none.
    if [b is not None for b in buffers] == needed and not torch.is_grad_enabled():
        return (*(None if b is None else _scaled(b, grad_loss) for b in buffers), *nothing)
    del buffers
    gradients = torch.ops.lissom.linear_distill_loss_grad.default(
        grad_loss, *ctx.saved_tensors, *ctx.options, *needed, ctx.backend
    )
    return (*(g if n else None for g, n in zip(gradients, needed, strict=True)), *nothing)


def _grad_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _grad_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        f"{_OP}: double backward is not supported: the loss can be differentiated once; write it with "
        "torch.nn.functional.linear, log_softmax and kl_div where second derivatives are needed"
    )


for _name, _run, _fake, _setup, _back in (
    (_OP, _linear_distill_loss, _fake_linear_distill_loss, _context, _backward),
    (_GRAD, _linear_distill_loss_grad, _fake_linear_distill_loss_grad, _grad_context, _grad_backward),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lissom::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"lissom::{_name}", _back, setup_context=_setup, lib=LIBRARY)
registry.register(
    _OP,
    "cpu",
    registry.Backend("native", _chunk_native, _native.unavailable_reason, _native.isa),
    registry.Backend(registry.REFERENCE, _chunk_reference),
)
register_gpu(_OP, _chunk_triton, _chunk_reference)
