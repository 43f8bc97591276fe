"""``lissom::linear_distill_loss`` on every implementation: against its page, and the loss of all logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lissom.ops import distill_loss, linear_distill_loss
from lissom.ops.distill_loss import REDUCTIONS, distill_scales
from lissom.ops.linear_distill_loss import CHUNK_BYTES, CHUNK_SHARE
from lissom.reference import linear_distill_loss as page
from lissom.reference.distill_loss import DIVERGENCES, DistillOptions
from lissom.testing import DTYPES, assert_same_bits

OP = torch.ops.lissom.linear_distill_loss.default
GRAD = torch.ops.lissom.linear_distill_loss_grad.default

ALL_TERMS: dict[str, Any] = {"kl_weight": 0.7, "ce_weight": 0.5, "entropy_weight": 0.3, "temperature": 2.0}
FORMS = ("hidden", "hidden+bias", "logits", "topk")

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""2-norm of an error relative to that of the right answer: the rounding of the logits (a relative error of
theirs is an absolute one of probabilities), of the gradient's elements and of sums over some chunks."""


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: dict[str, Any]
    labels: Tensor

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def trained(self, *names: str) -> Inputs:
        """Copies, of which those of ``names`` require grad; all without names."""
        names = names or ("hidden", "weight", "bias")
        copies = {
            name: None
            if (x := getattr(self, name)) is None
            else x.detach().clone().requires_grad_(name in names)
            for name in ("hidden", "weight", "bias")
        }
        return replace(self, **copies)

    def loss(self, **options: Any) -> Tensor:
        return linear_distill_loss(
            self.hidden, self.weight, self.bias, labels=self.labels, **self.teacher, **options
        )


def make(
    form: str = "hidden",
    dtype: torch.dtype = torch.float32,
    leading: tuple[int, ...] = (13,),
    k: int = 24,
    vocab: int = 37,
    *,
    bias: bool = True,
    seed: int = 0,
) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    labels = torch.randint(vocab, leading, generator=g)
    labels.view(-1)[3::4] = -100
    teacher: dict[str, Any]
    if form.startswith("hidden"):
        teacher = {"teacher_hidden": normal(*leading, k + 5), "teacher_weight": normal(vocab, k + 5) / 3}
        if form == "hidden+bias":
            teacher["teacher_bias"] = normal(vocab)
        teacher = {name: x.to(dtype) for name, x in teacher.items()}
    elif form == "logits":
        teacher = {"teacher_logits": (normal(*leading, vocab) * 2).to(dtype)}
    elif form == "topk":
        teacher = {"teacher_topk": tuple(F.log_softmax(normal(*leading, vocab) * 2, -1).topk(5, -1))}
    else:
        teacher = {}
    return Inputs(
        normal(*leading, k).to(dtype),
        (normal(vocab, k) / 3).to(dtype),
        normal(vocab).to(dtype) if bias else None,
        teacher,
        labels,
    )


def teacher_logits(inputs: Inputs) -> Tensor | None:
    t = inputs.teacher
    if "teacher_hidden" in t:
        return F.linear(t["teacher_hidden"], t["teacher_weight"], t.get("teacher_bias"))
    return t.get("teacher_logits")


def expected(
    inputs: Inputs, reduction: str, factors: Tensor | None = None, **options: Any
) -> tuple[Tensor, page.LinearDistillGradients]:
    """The page's losses and gradients."""
    o, t = DistillOptions(**options), inputs.teacher
    others: Any = t.get("teacher_logits")
    if "teacher_hidden" in t:
        others = (t["teacher_hidden"].flatten(0, -2), t["teacher_weight"], t.get("teacher_bias"))
    topk = t.get("teacher_topk")
    labels = inputs.labels.flatten()
    scales = distill_scales(reduction, int((labels != o.ignore_index).sum()), inputs.weight.shape[0])
    with torch.no_grad():
        losses, gradients = page.linear_distill_loss(
            (inputs.hidden.flatten(0, -2), inputs.weight, inputs.bias),
            others.flatten(0, -2) if isinstance(others, Tensor) else others,
            labels,
            o,
            topk=None if topk is None else (topk[0].flatten(0, -2), topk[1].flatten(0, -2)),
            term_scale=scales[0],
            ce_scale=scales[1],
            factors=factors,
        )
    return losses if reduction == "none" else losses.sum(), gradients


def assert_close(actual: Tensor, exact: Tensor, rtol: float) -> None:
    """The 2-norm of the error, relative."""
    assert actual.numel() == exact.numel()
    error = float((actual.double().flatten() - exact.flatten()).norm())
    assert error <= rtol * float(exact.norm()), (
        f"relative error {error / float(exact.norm()):.2e} > {rtol:.0e}"
    )


def check(
    inputs: Inputs, reduction: str = "batchmean", *, memory_budget: int | None = None, **options: Any
) -> None:
    """Loss and the gradients of all three, with an incoming gradient that is not 1."""
    inputs = inputs.trained()
    loss = inputs.loss(reduction=reduction, memory_budget=memory_budget, **options)
    assert loss.dtype == torch.float32
    incoming = torch.linspace(-0.5, 1.5, loss.numel()).view(loss.shape) if loss.dim() else torch.tensor(0.7)
    gradients = torch.autograd.grad(loss, inputs.leaves(), incoming)
    factors = incoming.flatten().expand(inputs.labels.numel())
    exact, exact_gradients = expected(inputs, reduction, factors, **options)
    rtol = TOLERANCE[inputs.hidden.dtype]
    assert_close(loss.detach(), exact, rtol)
    for leaf, gradient, right in zip(inputs.leaves(), gradients, exact_gradients, strict=False):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
        assert_close(gradient, right, rtol)


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_page_is_autograd_through_the_logits(form: str, reduction: str) -> None:
    """In float64, against autograd of the composition of torch's functions."""
    inputs = make(form).trained()
    hidden, weight, bias = (x.double() for x in inputs.leaves())
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    counted = inputs.labels != -100
    s = F.linear(*leaves)
    log_p = F.log_softmax(s / 2.0, -1)
    if form == "topk":
        kept, indices = inputs.teacher["teacher_topk"]
        kept = kept.double()
        divergence = (kept.exp() * (kept - log_p.gather(-1, indices))).sum(-1)
    else:
        doubles = replace(inputs, teacher={n: x.double() for n, x in inputs.teacher.items()})
        log_q = F.log_softmax(teacher_logits(doubles) / 2.0, -1)  # type: ignore[operator]
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ce = F.cross_entropy(s, inputs.labels, reduction="none")
    n = int(counted.sum())
    term, ce_scale = {
        "sum": (1, 1),
        "none": (1, 1),
        "batchmean": (1 / n, 1 / n),
        "mean": (1 / n / 37, 1 / n),
    }[reduction]
    losses = (term * 4.0 * (0.7 * divergence + 0.3 * entropy) + ce_scale * 0.5 * ce) * counted
    factors = torch.linspace(-1, 1, 13)
    right = torch.autograd.grad((losses * factors).sum(), leaves)
    found, gradients = expected(inputs, reduction, factors, **ALL_TERMS)
    torch.testing.assert_close(found, losses.detach() if reduction == "none" else losses.detach().sum())
    for one, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(implementation: str, form: str, reduction: str, dtype: torch.dtype) -> None:
    """One chunk, chunks of 4 rows (which do not divide 13), and of one row."""
    for rows, terms in ((None, {}), (4, ALL_TERMS), (1, ALL_TERMS)):
        row = 37 * (2 if form.startswith("hidden") else 1) * dtype.itemsize
        check(make(form, dtype), reduction, memory_budget=rows and rows * row, **terms)


OPTIONS: dict[str, dict[str, Any]] = {
    "reverse": {"divergence": "reverse"},
    "js": {"divergence": "js", "js_beta": 0.2},
    "softcap": {"softcap": 5.0},
    "scales": {"student_scale": 0.4, "teacher_scale": 1.7},
    "smoothing": {"ce_weight": 1.3, "label_smoothing": 0.1},
    "everything": {**ALL_TERMS, "softcap": 20.0, "student_scale": 1.5, "label_smoothing": 0.2},
    "ce-only": {"kl_weight": 0.0, "ce_weight": 1.0},
    "entropy": {"entropy_weight": 0.4},
    "other ignore_index": {"ignore_index": 7, **ALL_TERMS},
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in OPTIONS
        for form in ("hidden", "topk")
        if form == "hidden" or "divergence" not in OPTIONS[name]
    ],
)
def test_every_option(implementation: str, name: str, form: str) -> None:
    inputs = make(form)
    if OPTIONS[name].get("ignore_index"):
        inputs = replace(inputs, labels=inputs.labels.masked_fill(inputs.labels == -100, 7))
    for bias in (True, False):
        given = inputs if bias else replace(inputs, bias=None)
        check(given, memory_budget=37 * 4 * 2 * 5, **OPTIONS[name])


def test_without_a_teacher(implementation: str) -> None:
    for options in ({"ce_weight": 1.0}, {"entropy_weight": 1.0}):
        check(make("none"), kl_weight=0.0, **options)


@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_one_chunk_is_distill_loss_of_the_logits(implementation: str, form: str) -> None:
    """Bit for bit: the same products and the same kernel."""
    inputs = make(form, leading=(2, 9))
    for reduction, divergence in itertools.product(REDUCTIONS, DIVERGENCES):
        options = {**ALL_TERMS, "reduction": reduction, "divergence": divergence}
        logits = F.linear(inputs.hidden.flatten(0, 1), inputs.weight, inputs.bias)
        others = teacher_logits(inputs)
        assert others is not None
        right = distill_loss(logits.view(2, 9, 37), others, inputs.labels, **options)
        torch.testing.assert_close(inputs.loss(**options), right, rtol=1e-6, atol=0)


def test_all_of_the_vocabulary_as_top_k_is_forward_kl(implementation: str) -> None:
    inputs = make("logits")
    every = F.log_softmax(inputs.teacher["teacher_logits"] / 2.0, -1).sort(-1, descending=True)
    topk = replace(inputs, teacher={"teacher_topk": tuple(every)})
    torch.testing.assert_close(topk.loss(**ALL_TERMS), inputs.loss(**ALL_TERMS), rtol=2e-6, atol=0)


def test_indices_int32_and_log_probs_of_low_precision(implementation: str) -> None:
    inputs = make("topk", torch.bfloat16)
    log_probs, indices = inputs.teacher["teacher_topk"]
    low = replace(inputs, teacher={"teacher_topk": (log_probs.bfloat16(), indices.int())})
    check(low, memory_budget=300, **ALL_TERMS)
    check(replace(low, labels=low.labels.int()), memory_budget=300, **ALL_TERMS)


def test_a_wide_vocabulary(implementation: str) -> None:
    check(make("hidden+bias", leading=(5,), k=16, vocab=2100), memory_budget=2 * 2100 * 4 * 2, **ALL_TERMS)


# ------------------------------------------------------------------------------------------- shapes


def test_leading_dimensions_and_strides(implementation: str) -> None:
    inputs = make("hidden", leading=(3, 2, 4))
    right = inputs.loss(reduction="none", **ALL_TERMS)
    assert right.shape == (3, 2, 4)
    other = replace(
        inputs,
        hidden=inputs.hidden.transpose(0, 2).contiguous().transpose(0, 2),
        weight=inputs.weight.t().contiguous().t(),
        bias=torch.stack([inputs.bias, inputs.bias], 1)[:, 0],  # type: ignore[list-item]
        teacher={name: x.expand_as(x).mT.contiguous().mT for name, x in inputs.teacher.items()},
    )
    torch.testing.assert_close(other.loss(reduction="none", **ALL_TERMS), right, rtol=1e-5, atol=1e-6)
    check(other, memory_budget=37 * 4 * 2 * 5, **ALL_TERMS)
    expanded = make("hidden", leading=(6,))
    row = expanded.hidden[:1].expand(6, -1)
    check(replace(expanded, hidden=row), **ALL_TERMS)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(implementation: str, reduction: str) -> None:
    inputs = make("hidden", leading=(2, 0)).trained()
    loss = inputs.loss(reduction=reduction, **ALL_TERMS)
    if reduction == "none":
        assert loss.shape == (2, 0)
    else:
        assert loss.item() == 0 if reduction == "sum" else math.isnan(loss.item())
    gradients = torch.autograd.grad(loss.sum(), inputs.leaves())
    for leaf, gradient in zip(inputs.leaves(), gradients, strict=True):
        assert_same_bits(gradient, torch.zeros_like(leaf))


def test_all_rows_ignored(implementation: str) -> None:
    inputs = make("hidden").trained()
    inputs = replace(inputs, labels=torch.full_like(inputs.labels, -100))
    assert math.isnan(inputs.loss(**ALL_TERMS).item())
    loss = inputs.loss(reduction="sum", **ALL_TERMS)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, inputs.leaves()):
        assert not gradient.any()


def test_nan_in_a_row_is_a_nan_loss(implementation: str) -> None:
    inputs = make("hidden").trained()
    with torch.no_grad():
        inputs.hidden[4, 2] = math.nan
    losses = inputs.loss(reduction="none", memory_budget=37 * 8 * 3)
    assert losses.isnan().nonzero().tolist() == [[4]]
    loss = inputs.loss()
    assert math.isnan(loss.item())
    hidden, weight, _ = torch.autograd.grad(loss, inputs.leaves())
    assert hidden.isnan().any(-1).nonzero().tolist() == [[4]]
    assert weight.isnan().all()


# ------------------------------------------------------------------------------------------- autograd


def products(function: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of the matrix products that ``function`` makes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        function()
    names = ("aten::mm", "aten::addmm", "aten::addmm_")
    return [tuple(map(tuple, e.input_shapes[:2])) for e in profile.events() if e.name in names]


@pytest.mark.parametrize("memory_budget", [None, 37 * 4 * 2 * 4], ids=["one chunk", "chunks"])
def test_only_what_is_needed_is_computed(implementation: str, memory_budget: int | None) -> None:
    chunks = 1 if memory_budget is None else 4
    inputs = make("hidden")

    def count(*names: str, backward: bool = True) -> int:
        given = inputs.trained(*names) if names else inputs

        def run() -> None:
            loss = given.loss(memory_budget=memory_budget)
            if backward and names:
                loss.backward()

        return len(products(run)) // chunks

    assert count() == 2  # the logits of both
    assert count("hidden") == 3
    assert count("weight") == 3
    assert count("bias") == 2
    assert count("hidden", "weight", "bias") == 4
    with torch.no_grad():
        assert count("hidden", "weight", backward=False) == 2
    given = inputs.trained("weight")
    given.loss().backward()
    assert given.hidden.grad is None
    assert given.bias is not None
    assert given.bias.grad is None


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward(implementation: str, dtype: torch.dtype, reduction: str) -> None:
    inputs = make("hidden", dtype).trained()
    loss = inputs.loss(reduction=reduction, memory_budget=37 * 4 * 2 * 4, **ALL_TERMS)
    factor = torch.full_like(loss, 0.7)
    first = torch.autograd.grad(loss, inputs.leaves(), factor, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, inputs.leaves(), factor * 2)
    for one, other, held in zip(first, second, kept, strict=True):
        assert_same_bits(one, held)  # it was not the graph's any more
        assert_close(other, 2 * held.double(), 2 * TOLERANCE[dtype])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.sum().backward()


def test_a_backward_of_some_of_what_was_made(implementation: str) -> None:
    inputs = make("hidden").trained()
    (only,) = torch.autograd.grad(inputs.loss(), [inputs.weight])
    everything = torch.autograd.grad(inputs.loss(), inputs.leaves())
    torch.testing.assert_close(only, everything[1], rtol=1e-5, atol=1e-7)


def test_teachers_get_no_gradient(implementation: str) -> None:
    for form in FORMS:
        inputs = make(form)
        for tensors in inputs.teacher.values():
            for x in tensors if isinstance(tensors, tuple) else (tensors,):
                x.requires_grad_(x.is_floating_point())
        assert not inputs.loss().requires_grad
        given = inputs.trained()
        given.loss().backward()
        for tensors in inputs.teacher.values():
            assert all(x.grad is None for x in (tensors if isinstance(tensors, tuple) else (tensors,)))


def test_tied_weights_sum_their_gradients(implementation: str) -> None:
    """The embedding is the output layer: both uses reach ``.grad``."""
    table = torch.randn(37, 24, requires_grad=True)
    labels = torch.arange(6)
    linear_distill_loss(
        F.embedding(labels, table), table, labels=labels, kl_weight=0.0, ce_weight=1.0
    ).backward()
    grad, table.grad = table.grad, None
    F.cross_entropy(F.linear(F.embedding(labels, table), table), labels).backward()
    torch.testing.assert_close(grad, table.grad, rtol=1e-5, atol=1e-6)


def test_loss_scaling_keeps_small_gradients_of_float16(implementation: str) -> None:
    inputs = make("hidden", torch.float16).trained()
    loss = inputs.loss(reduction="mean") * 1e-6
    (scaled,) = torch.autograd.grad(loss * 2.0**20, [inputs.hidden])
    _, right = expected(inputs, "mean")
    assert_close(scaled, right.hidden * 2.0**20 * 1e-6, 1e-2)


def test_double_backward_is_refused(implementation: str) -> None:
    inputs = make("hidden").trained()
    gradients = torch.autograd.grad(inputs.loss(), inputs.leaves(), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradients[1].sum().backward()


def test_torch_func_is_refused() -> None:
    inputs = make("hidden")
    with pytest.raises(RuntimeError, match=r"torch\.func transforms .* are not supported"):
        torch.func.grad(lambda h: replace(inputs, hidden=h).loss())(inputs.hidden)


def test_nothing_but_gradients_changes(implementation: str) -> None:
    inputs = make("hidden").trained()
    before = [x.detach().clone() for x in (*inputs.leaves(), *inputs.teacher.values(), inputs.labels)]
    inputs.loss(memory_budget=37 * 4 * 2 * 4, **ALL_TERMS).backward()
    for now, then in zip((*inputs.leaves(), *inputs.teacher.values(), inputs.labels), before, strict=True):
        assert_same_bits(now.detach(), then)


def test_autocast(implementation: str) -> None:
    """Everything is cast as F.linear does it, and gradients come back in the parameters' dtype."""
    inputs = make("hidden+bias").trained()
    low = make("hidden+bias", torch.bfloat16).trained()
    with torch.autocast("cpu", torch.bfloat16):
        loss = inputs.loss(**ALL_TERMS)
        mixed = replace(inputs, hidden=inputs.hidden.bfloat16()).loss(**ALL_TERMS)
    loss.backward()
    right = low.loss(**ALL_TERMS)
    right.backward()
    assert_same_bits(loss.detach(), right.detach())
    assert_same_bits(mixed.detach(), right.detach())
    for leaf, other in zip(inputs.leaves(), low.leaves(), strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert_same_bits(leaf.grad, other.grad.float())


# ------------------------------------------------------------------------------------------- the operator


def schema_arguments(inputs: Inputs, reduction: str, *needed: bool, **more: Any) -> tuple[Any, ...]:
    t = inputs.teacher
    tensors = [
        *(inputs.hidden, inputs.weight, inputs.bias),
        *(t.get(f"teacher_{name}") for name in ("hidden", "weight", "bias", "logits")),
        *(t.get("teacher_topk") or (None, None)),
        inputs.labels,
    ]
    options = (2.0, 0.7, 0.5, 0.3, "forward", 0.5, -100, 0.1, None, 1.0, 1.0, reduction)
    return (*tensors, *options, more.get("memory_budget"), *needed, None)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    for reduction, needed in (("batchmean", True), ("none", False)):
        inputs = make(form).trained("hidden", "weight")
        args = schema_arguments(inputs, reduction, needed, needed, False, memory_budget=700)
        assert set(torch.library.opcheck(OP, args).values()) == {"SUCCESS"}
        grad_loss = torch.rand(13) if reduction == "none" else torch.tensor(0.5)
        args = schema_arguments(make(form, torch.float16), reduction, True, False, True)
        assert set(torch.library.opcheck(GRAD, (grad_loss, *args)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile_fullgraph(dtype: torch.dtype) -> None:
    """Forward and backward in one graph; a new number of rows too."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, others: Tensor, labels: Tensor) -> Tensor:
        how = {"teacher_logits": others, "labels": labels, "ce_weight": 1.0}
        rows = linear_distill_loss(hidden, weight, bias, **how, reduction="none")
        return linear_distill_loss(hidden, weight, bias, **how) * 0.5 + (rows * rows).sum()

    torch._dynamo.reset()
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        for rows in (6, 6, 4):
            inputs = make("logits", dtype, (rows,)).trained()
            value = function(*inputs.leaves(), inputs.teacher["teacher_logits"], inputs.labels)
            value.backward()
            found.append([value.detach(), *(x.grad for x in inputs.leaves())])
    for eager, traced in zip(found[:3], found[3:], strict=True):
        for e, t in zip(eager, traced, strict=True):
            torch.testing.assert_close(t, e, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_fake_makes_the_same_checks() -> None:
    meta = {"device": "meta"}
    with pytest.raises(ValueError, match=r"vocabulary of 11 but teacher_logits of 12"):
        linear_distill_loss(
            torch.empty(2, 5, **meta), torch.empty(11, 5, **meta), teacher_logits=torch.empty(2, 12, **meta)
        )


# ------------------------------------------------------------------------------------------- memory


def peak_memory(function: Callable[[], Any]) -> int:
    """Most bytes that torch's allocator held at once for ``function``, above what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("needs_native")
def test_memory_is_a_tenth_of_the_logits_form(dtype: torch.dtype, form: str) -> None:
    """Beyond the gradients, which both forms give."""
    rows, k, vocab = 1024, 4, 8000
    inputs = make(form, dtype, (rows,), k, vocab).trained()
    gradients = sum(x.nbytes for x in inputs.leaves())

    def chunked() -> None:
        inputs.loss(**ALL_TERMS).backward()

    def unfused() -> None:
        s, t = F.linear(*inputs.leaves()), teacher_logits(inputs)
        log_p = F.log_softmax(s / 2.0, -1)
        if t is None:
            kept, indices = inputs.teacher["teacher_topk"]
            loss = (kept.exp() * (kept - log_p.gather(-1, indices))).sum(-1).mean()
        else:
            loss = F.kl_div(log_p, F.log_softmax(t / 2.0, -1), reduction="batchmean", log_target=True)
        (loss + F.cross_entropy(s, inputs.labels) - (log_p.exp() * log_p).sum(-1).mean()).backward()

    peaks = []
    for function in (chunked, unfused):
        for x in inputs.leaves():
            x.grad = None
        peaks.append(peak_memory(function) - gradients)
    assert peaks[0] <= 0.1 * peaks[1], peaks
    teachers = 2 if form.startswith("hidden") else 1
    logits = teachers * rows * vocab * dtype.itemsize
    bound = min(CHUNK_BYTES, max(CHUNK_SHARE * logits, 4 << 20))
    assert peaks[0] <= bound + 200 * rows + gradients + (2 << 20 if dtype != torch.float32 else 0)


@pytest.mark.usefixtures("needs_native")
def test_memory_budget_is_kept() -> None:
    inputs = make("hidden", leading=(512,), k=4, vocab=2000).trained()
    gradients = sum(x.nbytes for x in inputs.leaves())
    for budget in (100_000, 1_000_000):
        peak = peak_memory(lambda: inputs.loss(memory_budget=budget).backward())  # noqa: B023
        assert peak <= budget + 2 * gradients + 64 * 512


@pytest.mark.parametrize("backward", [True, False])
def test_the_gradients_are_let_go(implementation: str, backward: bool) -> None:
    """By a backward, though the loss lives on, as in a list of losses; and with the loss, without one."""
    inputs = make("hidden", k=50, vocab=300).trained()

    def run() -> Tensor | None:
        loss = inputs.loss(**ALL_TERMS)
        if not backward:
            return None
        loss.backward()
        for x in inputs.leaves():
            x.grad = None
        return loss

    run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sum(e.nbytes() for e in events) < inputs.hidden.nbytes
    del kept


# ------------------------------------------------------------------------------------------- bad input


def bad(inputs: Inputs, **changes: Any) -> Callable[[], Tensor]:
    """The loss with some arguments changed."""
    given = {
        "student_hidden": inputs.hidden,
        "student_weight": inputs.weight,
        "student_bias": inputs.bias,
        "labels": inputs.labels,
        **inputs.teacher,
        **changes,
    }
    return lambda: linear_distill_loss(**given)


H, LOGITS, TOPK = make("hidden+bias"), make("logits"), make("topk")
LOG_PROBS, INDICES = TOPK.teacher["teacher_topk"]
FAR = INDICES.clone()
FAR[2, 1] = 37

BAD: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "float64": (
        bad(H, student_hidden=H.hidden.double()),
        TypeError,
        r"student_hidden has dtype torch\.float64; use .*student_hidden\.float\(\)",
    ),
    "mixed": (
        bad(H, student_hidden=H.hidden.bfloat16()),
        TypeError,
        r"student_hidden is torch\.bfloat16 but student_weight torch\.float32; they must be the same",
    ),
    "features": (
        bad(H, student_hidden=H.hidden[:, :5]),
        ValueError,
        r"student_hidden has shape \(13, 5\) but student_weight is \[V=37, K=24\]",
    ),
    "weight": (bad(H, student_weight=H.weight[0]), ValueError, r"student_weight has shape \(24,\)"),
    "bias": (bad(H, student_bias=H.bias[:5]), ValueError, r"student_bias must have shape \[37\], got \(5,\)"),  # type: ignore[index]
    "vocabulary": (
        bad(H, teacher_weight=H.teacher["teacher_weight"][:30], teacher_bias=None),
        ValueError,
        r"vocabulary of 37 but teacher_weight of 30; .* one is padded: slice or pad the student's .* \[:30\]",
    ),
    "rows": (
        bad(H, teacher_hidden=H.teacher["teacher_hidden"][:7]),
        ValueError,
        r"teacher_hidden has shape \(7, 29\); it must be \[13, K'\]",
    ),
    "two teachers": (
        bad(H, **LOGITS.teacher),
        ValueError,
        "teacher_hidden and teacher_logits are given; a teacher comes in one of the forms",
    ),
    "no teacher": (
        bad(H, teacher_hidden=None, teacher_weight=None, teacher_bias=None),
        ValueError,
        "no teacher",
    ),
    "half a teacher": (bad(H, teacher_weight=None), ValueError, "teacher_weight is None"),
    "bias alone": (
        bad(LOGITS, teacher_bias=torch.zeros(37)),
        ValueError,
        "teacher_bias to both; teacher_weight is None",
    ),
    "logits' rows": (
        bad(LOGITS, teacher_logits=torch.zeros(12, 37)),
        ValueError,
        r"teacher_logits has shape \(12, 37\); it must be \[13, V\]",
    ),
    "no labels": (bad(H, labels=None, ce_weight=1.0), ValueError, "labels is None but ce_weight=1.0"),
    "labels' shape": (
        bad(H, labels=H.labels[:4]),
        ValueError,
        r"labels has shape \(4,\); it must be \[13\]",
    ),
    "labels' dtype": (bad(H, labels=H.labels.float()), TypeError, r"labels has dtype torch\.float32"),
    "label": (
        bad(H, labels=H.labels.masked_fill(torch.arange(13) == 2, 37)),
        ValueError,
        r"labels\[2\] is 37, which is not in \[0, 37\)",
    ),
    "index": (
        bad(TOPK, teacher_topk=(LOG_PROBS, FAR)),
        ValueError,
        r"indices\[2, 1\] is 37, which is not in \[0, 37\)",
    ),
    "top-k's shapes": (
        bad(TOPK, teacher_topk=(LOG_PROBS, INDICES[:, :2])),
        ValueError,
        r"log_probs has shape \(13, 5\) but indices \(13, 2\)",
    ),
    "top-k's rows": (
        bad(TOPK, teacher_topk=(LOG_PROBS[:5], INDICES[:5])),
        ValueError,
        r"teacher_topk has shape \(5, 5\); it must be \[13, k\]",
    ),
    "top-k's type": (bad(TOPK, teacher_topk=LOG_PROBS), TypeError, r"must be \(log_probs, indices\)"),
    "top-k's indices": (
        bad(TOPK, teacher_topk=(LOG_PROBS, LOG_PROBS)),
        TypeError,
        r"indices has dtype torch\.float32",
    ),
    "top-k reverse": (
        bad(TOPK, divergence="reverse"),
        ValueError,
        "divergence='reverse' needs all of the teacher's logits",
    ),
    "temperature": (bad(H, temperature=0.0), ValueError, r"temperature=0\.0 must be positive"),
    "divergence": (bad(H, divergence="kl"), ValueError, "divergence='kl' is unknown"),
    "reduction": (bad(H, reduction="max"), ValueError, "reduction='max' is unknown"),
    "budget": (bad(H, memory_budget=0), ValueError, "memory_budget=0 must be positive"),
    "device": (
        bad(H, teacher_hidden=H.teacher["teacher_hidden"].to("meta")),
        ValueError,
        r"teacher_hidden is on meta but student_hidden is on cpu",
    ),
    "backend": (bad(H, backend="cuda"), ValueError, "backend='cuda' does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()
