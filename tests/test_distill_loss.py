"""``lissom::distill_loss`` and its gradient on every implementation."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from lissom import _native, registry, testing
from lissom.ops import distill_loss
from lissom.ops.distill_loss import REDUCTIONS, distill_scales
from lissom.reference import distill_loss as page
from lissom.reference.distill_loss import DIVERGENCES, DistillOptions
from lissom.testing import (
    DISTILL_CASES,
    DISTILL_KINDS,
    DISTILL_TOLERANCE,
    DTYPES,
    SMALLEST_SUBNORMAL,
    UNIT_ROUNDOFF,
    VIEWS,
    DistillCase,
    DistillInputs,
    assert_same_bits,
    assert_within,
    distill_inputs,
)

RunPython = Callable[..., subprocess.CompletedProcess[str]]

ROUNDING = 2 * UNIT_ROUNDOFF[torch.float32]
"""What float32's exp knows of a probability near 1: one unit in the last place."""

CANCELLING = 2 * ROUNDING
"""Where student and teacher nearly agree: what is left of two probabilities, and of two log-sum-exps."""

ALL_TERMS: dict[str, Any] = {"kl_weight": 0.7, "ce_weight": 0.5, "entropy_weight": 0.3, "temperature": 2.0}


def random_options(seed: int) -> dict[str, Any]:
    """Options of a seeded draw; each is often at its default."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    return {
        "temperature": one_of(1.0, 2.0, between(0.5, 5.0)),
        "kl_weight": one_of(1.0, 1.0, between(0.1, 2.0)),
        "ce_weight": one_of(0.0, 1.0, between(0.1, 2.0)),
        "entropy_weight": one_of(0.0, 0.0, between(0.01, 1.0)),
        "divergence": DIVERGENCES[seed % 3],
        "js_beta": between(0.05, 0.95),
        "label_smoothing": one_of(0.0, 0.1, between(0.0, 1.0)),
        "softcap": one_of(None, None, 30.0, between(3.0, 50.0)),
        "student_scale": one_of(1.0, 1.0, between(0.3, 2.0)),
        "teacher_scale": one_of(1.0, 1.0, between(0.3, 2.0)),
    }


def composition(
    student: Tensor, teacher: Tensor, labels: Tensor, o: DistillOptions, reduction: str
) -> Tensor:
    """The loss as users write it with torch's functions; differentiable, no masks."""

    def cap(z: Tensor) -> Tensor:
        return z if o.softcap is None else o.softcap * torch.tanh(z / o.softcap)

    counted = labels != o.ignore_index
    t = o.temperature
    z = cap(student * o.student_scale)[counted]
    log_p = F.log_softmax(z / t, -1)
    log_q = F.log_softmax(cap(teacher * o.teacher_scale)[counted] / t, -1)

    def kl(log_input: Tensor, log_target: Tensor) -> Tensor:
        if reduction == "mean":  # F.kl_div announces another "mean"
            return F.kl_div(log_input, log_target, reduction="none", log_target=True).mean()
        value = F.kl_div(log_input, log_target, reduction=reduction, log_target=True)
        return value.sum(-1) if reduction == "none" else value

    if o.divergence == "forward":
        divergence = kl(log_p, log_q)
    elif o.divergence == "reverse":
        divergence = kl(log_q, log_p)
    else:
        log_m = torch.logsumexp(
            torch.stack([log_q + math.log(o.js_beta), log_p + math.log(1 - o.js_beta)]), dim=0
        )
        divergence = o.js_beta * kl(log_m, log_q) + (1 - o.js_beta) * kl(log_m, log_p)
    entropy = torch.distributions.Categorical(logits=z / t).entropy()
    ce = F.cross_entropy(z, labels[counted], reduction="none", label_smoothing=o.label_smoothing)
    n, vocab = z.shape
    if reduction == "none":
        every = student.new_zeros(len(labels))
        total = t**2 * (o.kl_weight * divergence + o.entropy_weight * entropy) + o.ce_weight * ce
        return every.masked_scatter(counted, total)
    by_term = {"sum": 1, "batchmean": n, "mean": n * vocab}[reduction]
    by_row = 1 if reduction == "sum" else n
    terms = o.kl_weight * divergence + o.entropy_weight * entropy.sum() / by_term
    return t**2 * terms + o.ce_weight * ce.sum() / by_row


def solve(
    inputs: DistillInputs, reduction: str = "none", upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The op's loss and gradient."""
    student = inputs.student.detach().requires_grad_()
    loss = distill_loss(student, inputs.teacher, inputs.labels, reduction=reduction, **options)
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


@functools.cache
def made(case: DistillCase, *args: Any, **options: Any) -> DistillInputs:
    """Shared by all implementations."""
    return distill_inputs(case, *args, **options)


def expected(
    inputs: DistillInputs, options: dict[str, Any], reduction: str = "none"
) -> tuple[Tensor, Tensor]:
    """The page's losses and gradients, float64 ``[R]`` and ``[R, V]``."""
    o = DistillOptions(**options)
    counted = int((inputs.labels != o.ignore_index).sum())
    term_scale, ce_scale = distill_scales(reduction, counted, inputs.student.shape[-1])
    return page.row_losses(
        inputs.student, inputs.teacher, inputs.labels, o, term_scale=term_scale, ce_scale=ce_scale
    )


def check(inputs: DistillInputs, options: dict[str, Any], natural: float = ROUNDING, **how: Any) -> None:
    """Each row's loss and gradient within ``DISTILL_TOLERANCE`` of the page.

    ``natural``: the error allowed besides, as a share of the largest probability times the weights: loss and
    gradient are differences of such numbers, and may be zero.
    """
    loss, grad = solve(inputs, **how, **options)
    row_loss, row_grad = expected(inputs, options)
    o = DistillOptions(**options)
    assert loss.dtype == torch.float32
    assert (grad.shape, grad.dtype) == (inputs.student.shape, inputs.student.dtype)
    infinite = row_loss.isinf()
    assert torch.equal(loss[infinite].double(), row_loss[infinite])
    weights = o.temperature**2 * (o.kl_weight + o.entropy_weight) + o.ce_weight
    bound = DISTILL_TOLERANCE * row_loss.abs() + natural * weights
    assert_within(loss[~infinite], row_loss[~infinite], bound[~infinite])
    if not grad.numel():
        return
    weights = (o.temperature * (o.kl_weight + o.entropy_weight) + o.ce_weight) * abs(o.student_scale)
    largest, norm = (natural * weights * size for size in probabilities(inputs, o))
    bound = (DISTILL_TOLERANCE * row_grad.abs().amax(-1) + largest)[:, None].expand_as(row_grad)
    if grad.dtype == torch.float32:
        if 0 < abs(o.student_scale) < 1e-30:  # then the gradient may be below the type's normal range
            below = SMALLEST_SUBNORMAL[torch.float32]
            bound, norm = bound + below, norm + below * grad.shape[-1] ** 0.5
        norm = DISTILL_TOLERANCE * row_grad.norm(dim=-1) + norm
        assert_within((grad.double() - row_grad).norm(dim=-1), torch.zeros_like(norm), norm)
    else:
        bound = bound + row_grad.abs() * UNIT_ROUNDOFF[grad.dtype] + SMALLEST_SUBNORMAL[grad.dtype]
    assert_within(grad, row_grad, bound)


def probabilities(inputs: DistillInputs, o: DistillOptions) -> tuple[Tensor, Tensor]:
    """The largest and the 2-norm of those of student, teacher and label, float64 ``[R]``."""
    if o.ce_weight:
        return (torch.full_like(inputs.labels, math.sqrt(2), dtype=torch.float64),) * 2
    both = []
    for given, scale in ((inputs.student, o.student_scale), (inputs.teacher, o.teacher_scale)):
        z = given.double() * scale
        z = z if o.softcap is None else o.softcap * torch.tanh(z / o.softcap)
        both.append(torch.softmax(z / o.temperature, -1))
    return torch.stack(both).amax((0, -1)), torch.stack(both).norm(dim=(0, -1))


def check_kind(inputs: DistillInputs, options: dict[str, Any], kind: str, what: object) -> None:
    natural = ROUNDING
    if kind in ("close", "equal"):
        # Capped logits are float32 numbers up to the cap: their difference is off by two halves of its ulp.
        natural = CANCELLING + (options.get("softcap") or 0.0) * 2**-24 / options.get("temperature", 1.0)
    try:
        check(inputs, options, natural)
    except AssertionError as error:
        raise AssertionError(f"{what} {kind} {inputs.student.dtype} {options}: {error}") from error


# ------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_page_is_the_composition_of_torch_functions(divergence: str, reduction: str) -> None:
    """Loss and gradient, in float64, against autograd."""
    for seed in range(25):
        options = {**random_options(seed), "divergence": divergence}
        o = DistillOptions(**options)
        inputs = made(DistillCase(9, 23, "page"), kind="normal", seed=seed)
        student = inputs.student.double().requires_grad_()
        exact = composition(student, inputs.teacher.double(), inputs.labels, o, reduction)
        (exact_grad,) = torch.autograd.grad(exact.sum(), student)
        loss, grad = expected(inputs, options, reduction)
        torch.testing.assert_close(loss if reduction == "none" else loss.sum(), exact, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-11, atol=1e-14)


def test_page_of_top_k() -> None:
    """With all V kept it is forward KL; with fewer, the terms of those, against autograd."""
    inputs = made(DistillCase(6, 13, "top-k"), ignored=False)
    options = DistillOptions(temperature=3.0, kl_weight=0.7, entropy_weight=0.1, ce_weight=0.4, softcap=9.0)
    capped = 9.0 * torch.tanh(inputs.teacher.double() / 9.0)
    log_q = F.log_softmax(capped / 3.0, -1)
    every = torch.arange(13).expand(6, 13)
    full = page.row_losses(inputs.student, inputs.teacher, inputs.labels, options)
    for one, other in zip(
        page.row_losses(inputs.student, None, inputs.labels, options, topk=(log_q, every)), full, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    kept, indices = log_q.topk(4, -1)
    student = inputs.student.double().requires_grad_()
    log_p = F.log_softmax(9.0 * torch.tanh(student / 9.0) / 3.0, -1)
    exact = 9.0 * (kept.exp() * (kept - log_p.gather(-1, indices))).sum(-1)
    (exact_grad,) = torch.autograd.grad(exact.sum(), student)
    only = DistillOptions(temperature=3.0, softcap=9.0)
    loss, grad = page.row_losses(inputs.student, None, None, only, topk=(kept, indices))
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_page_of_masked_logits_is_that_of_the_others(divergence: str) -> None:
    """What both mask might as well not be in the vocabulary."""
    inputs = made(DistillCase(5, 20, "masks"), ignored=False)
    options = DistillOptions(divergence=divergence, entropy_weight=0.3, ce_weight=0.5, temperature=2.0)
    left = torch.arange(20) % 3 != 1
    masked = [x.masked_fill(~left, -math.inf) for x in (inputs.student, inputs.teacher)]
    labels = (left.cumsum(0) - 1)[left].new_tensor([0, 3, 5, 12, 1])
    loss, grad = page.row_losses(masked[0], masked[1], left.nonzero()[labels, 0], options)
    fewer, fewer_grad = page.row_losses(inputs.student[:, left], inputs.teacher[:, left], labels, options)
    torch.testing.assert_close(loss, fewer, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad[:, left], fewer_grad, rtol=1e-11, atol=1e-16)
    assert not bool(grad[:, ~left].any())


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_defaults_are_kl_div(implementation: str, temperature: float, reduction: str) -> None:
    """Argument order, direction, T² and reductions are torch's."""
    inputs = made(DistillCase(16, 50, "defaults"))
    student = inputs.student.clone().requires_grad_()
    t = temperature
    divergence = F.kl_div(
        F.log_softmax(student.double() / t, -1),
        F.log_softmax(inputs.teacher.double() / t, -1),
        reduction="none" if reduction == "mean" else reduction,  # F.kl_div announces another "mean"
        log_target=True,
    )
    if reduction == "mean":
        divergence = divergence.mean()
    divergence = (divergence.sum(-1) if reduction == "none" else divergence) * t**2
    (exact,) = torch.autograd.grad(divergence.sum(), student)
    options = {} if reduction == "batchmean" else {"reduction": reduction}
    loss = distill_loss(student, inputs.teacher, temperature=t, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss.double(), divergence, rtol=DISTILL_TOLERANCE, atol=0)
    assert_within(grad, exact, (DISTILL_TOLERANCE * exact.abs().amax(-1, keepdim=True)).expand_as(exact))


def test_published_forms(implementation: str) -> None:
    """KL + λ·H and CE + KL."""
    inputs = made(DistillCase(16, 50, "published"), ignored=False)
    s, t, labels = inputs.student, inputs.teacher, inputs.labels
    log_p = F.log_softmax(s.double(), -1)
    divergence = F.kl_div(log_p, F.log_softmax(t.double(), -1), reduction="batchmean", log_target=True)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    for loss, exact in (
        (distill_loss(s, t, entropy_weight=0.1), divergence + 0.1 * entropy),
        (distill_loss(s, t, labels, ce_weight=1.0), divergence + F.nll_loss(log_p, labels)),
        (distill_loss(s, labels=labels, kl_weight=0.0, ce_weight=1.0), F.nll_loss(log_p, labels)),
        (distill_loss(s, kl_weight=0.0, entropy_weight=1.0), entropy),
    ):
        torch.testing.assert_close(loss.double(), exact, rtol=DISTILL_TOLERANCE, atol=0)


@pytest.mark.parametrize("case", DISTILL_CASES, ids=str)
def test_every_case(implementation: str, case: DistillCase) -> None:
    turns = itertools.product(DIVERGENCES, ({}, ALL_TERMS))
    for i, (divergence, terms) in enumerate(turns):
        torch.set_num_threads(1 + i % 2)
        dtype = DTYPES[(i // 2 if case.vocab < 10000 else 0) % 3]
        check_kind(made(case, dtype), {**terms, "divergence": divergence}, "normal", case)
    check_kind(made(case), {}, "normal", case)


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 3.7},
    "cold": {"temperature": 0.3},
    "kl_weight": {"kl_weight": 0.25},
    "entropy": {"entropy_weight": 0.4},
    "ce": {"ce_weight": 1.3},
    "ce-hot": {"ce_weight": 1.3, "temperature": 2.0},
    "smoothing": {"ce_weight": 1.3, "label_smoothing": 0.1},
    "all-smooth": {"ce_weight": 1.3, "label_smoothing": 1.0, "temperature": 2.0},
    "softcap": {"softcap": 5.0},
    "scales": {"student_scale": 0.4, "teacher_scale": 1.7},
    "negative-scales": {"student_scale": -0.4, "teacher_scale": -1.7},
    "student-without-scale": {"student_scale": 0.0},
    "teacher-without-scale": {"teacher_scale": 0.0, "ce_weight": 0.5, "temperature": 2.0},
    "scales-below-the-normal-range": {"student_scale": 1e-40, "teacher_scale": 1e-40},
    "no-kl": {"kl_weight": 0.0, "ce_weight": 1.0, "entropy_weight": 0.3, "temperature": 2.0},
    "ce-only": {"kl_weight": 0.0, "ce_weight": 1.0},
    "entropy-only": {"kl_weight": 0.0, "entropy_weight": 1.0, "temperature": 2.0},
    "everything": {
        **ALL_TERMS,
        "softcap": 20.0,
        "student_scale": 1.5,
        "label_smoothing": 0.2,
        "js_beta": 0.1,
    },
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(implementation: str, name: str, divergence: str) -> None:
    options = {**OPTIONS[name], "divergence": divergence}
    for dtype in DTYPES:
        check(made(DistillCase(7, 75, "options"), dtype), options)
    check(made(DistillCase(3, 1100, "options")), options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "scales", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e-40, 1.0), (1.0, 1e-40), (1e-30, 3e-21)]
)
def test_scales_that_leave_nothing_of_the_logits(
    implementation: str, scales: tuple[float, float], divergence: str
) -> None:
    """Probabilities are all alike then, whatever fills up a vector; also in rows of a single one."""
    options = {"student_scale": scales[0], "teacher_scale": scales[1], "divergence": divergence}
    for vocab, dtype in itertools.product((7, 16, 75, 300, 2050), DTYPES):
        for terms in ({}, {"ce_weight": 0.5}):
            check(made(DistillCase(3, vocab, "scales"), dtype), {**options, **terms})
    check(made(DistillCase(3, 75, "scales")), {**options, **ALL_TERMS})


@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_masked_logits_with_next_to_no_scale(implementation: str, scale: float) -> None:
    """A tiny scale leaves a mask of minus infinity what it is; 0 times infinity is NaN."""
    for vocab in (7, 75):
        given = made(DistillCase(3, vocab, "masks"), ignored=False)
        mask = torch.arange(vocab) == 1
        student, teacher = (logits.masked_fill(mask, -math.inf) for logits in (given.student, given.teacher))
        inputs = DistillInputs(student, teacher, torch.zeros(3, dtype=torch.int64))
        for options in ({"student_scale": scale}, {"teacher_scale": scale}):
            if scale == 0.0:
                loss, _ = solve(inputs, **options)
                assert loss.isnan().all()
            else:
                check(inputs, {"ce_weight": 0.3, **options})


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", DISTILL_KINDS)
def test_every_kind_of_logits(implementation: str, kind: str, divergence: str) -> None:
    for terms in ({}, ALL_TERMS, {"temperature": 4.0}, {"ce_weight": 1.0, "label_smoothing": 0.0}):
        if kind == "masked_teacher" and divergence == "reverse":
            continue  # infinite: test_infinite_divergence
        for case, dtype in (
            (DistillCase(9, 77, "kinds"), torch.float32),
            (DistillCase(5, 1500, "kinds"), torch.float32),
            (DistillCase(9, 40, "kinds"), torch.bfloat16),
            (DistillCase(9, 40, "kinds"), torch.float16),
        ):
            check_kind(made(case, dtype, kind=kind), {**terms, "divergence": divergence}, kind, case)


@pytest.mark.parametrize("part", range(4))
def test_randomized(implementation: str, part: int) -> None:
    """A seeded walk over shapes, kinds of logits and options; the seed that fails is in the assertion."""
    for seed in range(part * 40, part * 40 + 40):
        generator = torch.Generator().manual_seed(seed)

        def pick(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        case = DistillCase(pick(1, 12), pick(2, 100) if seed % 4 else pick(500, 5000), "random")
        kind = DISTILL_KINDS[pick(0, len(DISTILL_KINDS) - 1)]
        options = random_options(seed)
        if kind == "masked_teacher" and options["divergence"] == "reverse":
            options["divergence"] = "forward"
        if kind.startswith("masked"):
            options["label_smoothing"] = 0.0  # CE would be infinite
        if kind in ("offset", "extreme"):  # scaled, float32 holds no small differences of such logits
            options.update(student_scale=1.0, teacher_scale=1.0)
        if kind == "offset":  # capped, neither
            options["softcap"] = None
        dtypes = (torch.float32, torch.float32) if seed % 3 else (DTYPES[pick(0, 2)], DTYPES[pick(0, 2)])
        check_kind(made(case, *dtypes, kind=kind, seed=seed), options, kind, f"seed={seed} {case}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(implementation: str, reduction: str) -> None:
    """The scalar and its gradient, ignored rows among them."""
    for seed, (divergence, dtype) in enumerate(itertools.product(DIVERGENCES, DTYPES)):
        inputs = made(DistillCase(13, 37, "reductions"), dtype, seed=seed)
        options = {**ALL_TERMS, "divergence": divergence}
        loss, grad = solve(inputs, reduction, **options)
        row_loss, exact = expected(inputs, options, reduction)
        assert loss.dtype == torch.float32
        assert loss.shape == ((13,) if reduction == "none" else ())
        total = row_loss if reduction == "none" else row_loss.sum()
        torch.testing.assert_close(loss.double(), total, rtol=DISTILL_TOLERANCE, atol=0)
        bound = DISTILL_TOLERANCE * exact.abs().amax(-1, keepdim=True)
        bound = bound + (exact.abs() * UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 0)
        assert_within(grad, exact, (bound + SMALLEST_SUBNORMAL[dtype]).expand_as(exact))


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 1000])
def test_ignored_rows_count_in_no_term(
    implementation: str, ignore_index: int, label_dtype: torch.dtype
) -> None:
    """Even rows of NaN; what is left is as if they were not there."""
    inputs = made(DistillCase(9, 21, "ignored"), ignored=False)
    labels = inputs.labels.where(inputs.labels != ignore_index, 1).to(label_dtype)
    left = torch.tensor([0, 1, 3, 4, 7])
    others = torch.tensor([2, 5, 6, 8])
    labels[others] = ignore_index
    student, teacher = inputs.student.clone(), inputs.teacher.clone()
    student[5], teacher[6], student[8, 3], teacher[8, 4] = math.nan, math.nan, math.inf, -math.inf
    options = {**ALL_TERMS, "ignore_index": ignore_index}
    for reduction in REDUCTIONS:
        for some in (options, {**options, "ce_weight": 0.0}):
            loss, grad = solve(DistillInputs(student, teacher, labels), reduction, **some)
            fewer = DistillInputs(student[left], teacher[left], labels[left])
            fewer_loss, fewer_grad = solve(fewer, reduction, **some)
            if reduction == "none":
                assert not bool(loss[others].any())
                loss = loss[left]
            torch.testing.assert_close(loss, fewer_loss, rtol=2e-7, atol=0)
            assert_same_bits(grad[left], fewer_grad)
            assert_same_bits(grad[others].abs(), torch.zeros(4, 21))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counts(implementation: str, rows: int, reduction: str) -> None:
    """No rows, or all ignored: NaN for the means as F.cross_entropy has it, 0 for the sum; gradient 0."""
    inputs = made(DistillCase(rows, 7, "nothing counts"))
    inputs = DistillInputs(inputs.student, inputs.teacher, torch.full((rows,), -100))
    loss, grad = solve(inputs, reduction, **ALL_TERMS)
    if reduction == "none":
        assert_same_bits(loss, torch.zeros(rows))
    else:
        torch.testing.assert_close(
            loss, torch.tensor(0.0 if reduction == "sum" else math.nan), equal_nan=True
        )
    assert_same_bits(grad, torch.zeros(rows, 7))
    if not rows:
        without = distill_loss(inputs.student, inputs.teacher, reduction=reduction)
        torch.testing.assert_close(without, loss, equal_nan=True)


def test_empty_leading_dimensions(implementation: str) -> None:
    for shape in ((0, 7), (3, 0, 7), (0, 2, 7)):
        student = torch.randn(shape, requires_grad=True)
        loss = distill_loss(student, torch.randn(shape), reduction="none")
        assert loss.shape == shape[:-1]
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.shape == shape


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(implementation: str, divergence: str, where: str, bad: float) -> None:
    """And takes all of it; +inf has no softmax either."""
    for terms, vocab, dtype in (({}, 70, DTYPES[0]), (ALL_TERMS, 1500, DTYPES[0]), ({}, 33, DTYPES[1])):
        inputs = made(DistillCase(9, vocab, "NaN"), dtype, ignored=False)
        options = {**terms, "divergence": divergence}
        clean, clean_grad = solve(inputs, **options)
        for position in (0, vocab // 2, vocab - 1):
            tensors = {"student": inputs.student.clone(), "teacher": inputs.teacher.clone()}
            tensors[where][[2, 8], position] = bad
            loss, grad = solve(DistillInputs(**tensors, labels=inputs.labels), **options)
            good = [0, 1, 3, 4, 5, 6, 7]
            assert bool(loss[[2, 8]].isnan().all())
            assert bool(grad[[2, 8]].isnan().all())
            assert_same_bits(loss[good], clean[good])
            assert_same_bits(grad[good], clean_grad[good])
            scalar, _ = solve(DistillInputs(**tensors, labels=inputs.labels), "batchmean", **options)
            assert bool(scalar.isnan())


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_masked_all_over_are_nan(implementation: str, divergence: str, where: str) -> None:
    for vocab in (5, 40, 1100):
        inputs = made(DistillCase(3, vocab, "all masked"), ignored=False)
        student, teacher = inputs.student.clone(), inputs.teacher.clone()
        if where != "teacher":
            student[1] = -math.inf
        if where != "student":
            teacher[1] = -math.inf
        loss, grad = solve(DistillInputs(student, teacher, inputs.labels), divergence=divergence)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert bool(grad[[0, 2]].isfinite().all())


def test_nan_in_ce_and_entropy_alone(implementation: str) -> None:
    inputs = made(DistillCase(3, 40, "alone"), ignored=False)
    student = inputs.student.clone()
    student[1, 17] = math.nan
    teacher = torch.full_like(student, math.nan)  # not read
    for options in ({"ce_weight": 1.0}, {"entropy_weight": 1.0}, {"ce_weight": 1.0, "temperature": 3.0}):
        loss, grad = solve(DistillInputs(student, teacher, inputs.labels), kl_weight=0.0, **options)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]


def test_infinite_divergence(implementation: str) -> None:
    """One gives weight to what the other masks: +inf, forward or reverse; JS stays finite."""
    inputs = made(DistillCase(4, 50, "infinite"), ignored=False)
    masked = torch.zeros(4, 50, dtype=torch.bool)
    masked[1:3, 7:20] = True
    masked.scatter_(1, inputs.labels[:, None], False)
    student, teacher = (x.masked_fill(masked, -math.inf) for x in (inputs.student, inputs.teacher))
    less = DistillInputs(student, inputs.teacher, inputs.labels)
    for terms in ({}, ALL_TERMS):
        loss, grad = solve(less, **terms)
        assert loss.isinf().tolist() == [False, True, True, False]
        assert bool((loss > 0).all())
        check(less, terms)  # the gradient, p - q, is finite
        assert bool(grad.isfinite().all())
        more = DistillInputs(inputs.student, teacher, inputs.labels)
        loss, grad = solve(more, divergence="reverse", **terms)
        assert loss.isinf().tolist() == [False, True, True, False]
        assert bool((loss > 0).all())
        assert grad.isfinite().all(1).tolist() == [True, False, False, True]
        for inputs_ in (less, more):
            check(inputs_, {**terms, "divergence": "js"})


def test_label_that_is_masked(implementation: str) -> None:
    """-log 0: CE is +inf, and its gradient p - y."""
    inputs = made(DistillCase(3, 50, "masked label"), ignored=False)
    student = inputs.student.clone()
    student[1, inputs.labels[1]] = -math.inf
    for temperature in (1.0, 2.0):
        options = {"kl_weight": 0.0, "ce_weight": 1.0, "temperature": temperature}
        loss, _ = solve(DistillInputs(student, inputs.teacher, inputs.labels), **options)
        assert loss.isinf().tolist() == [False, True, False]
        check(DistillInputs(student, inputs.teacher, inputs.labels), options)


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("name", VIEWS)
def test_strides(implementation: str, name: str) -> None:
    for dtype in DTYPES:
        inputs = made(DistillCase(20, 34, "strides"), dtype)
        loss, grad = solve(inputs, **ALL_TERMS)
        student, teacher = (VIEWS[name](x) for x in (inputs.student, inputs.teacher))
        labels = inputs.labels
        if student.dim() == 3:
            labels = labels.view(4, 5)
            if name == "middle_of_three_dimensions":
                labels = labels.t()
        viewed_loss, viewed_grad = solve(DistillInputs(student, teacher, labels), **ALL_TERMS)
        assert viewed_loss.shape == student.shape[:-1]
        assert viewed_grad.shape == student.shape
        if name == "middle_of_three_dimensions":
            viewed_loss, viewed_grad = viewed_loss.t(), viewed_grad.transpose(0, 1)
        assert_same_bits(viewed_loss.reshape(20), loss)
        assert_same_bits(viewed_grad.reshape(20, 34), grad)


def test_expanded_logits(implementation: str) -> None:
    """One row for all: the gradient of the row is the sum."""
    inputs = made(DistillCase(6, 30, "expanded"), ignored=False)
    row = inputs.student[:1].clone().requires_grad_()
    loss = distill_loss(row.expand(6, 30), inputs.teacher[:1].expand(6, 30), reduction="sum")
    loss.backward()
    whole = distill_loss(inputs.student[:1], inputs.teacher[:1], reduction="sum")
    torch.testing.assert_close(loss, 6 * whole, rtol=1e-6, atol=0)
    assert row.grad is not None
    assert row.grad.shape == (1, 30)
    labels = torch.tensor(3).expand(6)
    assert distill_loss(inputs.student, inputs.teacher, labels, ce_weight=1.0).isfinite()


@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 3, 9), (2, 1, 4, 9)])
def test_leading_dimensions(implementation: str, shape: tuple[int, ...]) -> None:
    count = math.prod(shape[:-1])
    flat = made(DistillCase(count, 9, "leading"), ignored=False)
    inputs = DistillInputs(flat.student.view(shape), flat.teacher.view(shape), flat.labels.view(shape[:-1]))
    for reduction in REDUCTIONS:
        loss, grad = solve(inputs, reduction, **ALL_TERMS)
        flat_loss, flat_grad = solve(flat, reduction, **ALL_TERMS)
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert_same_bits(loss.reshape(flat_loss.shape), flat_loss)
        assert_same_bits(grad.reshape(count, 9), flat_grad)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_may_differ(implementation: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for divergence in DIVERGENCES:
        inputs = made(DistillCase(5, 70, "dtypes"), dtype, teacher_dtype)
        check(inputs, {**ALL_TERMS, "divergence": divergence})


def test_neighbours_in_memory_have_no_influence(implementation: str) -> None:
    for vocab, dtype in itertools.product((5, 33, 64, 1025), DTYPES):
        inputs = made(DistillCase(4, vocab, "neighbours"), dtype)
        wide = [torch.full((6, vocab + 40), math.nan, dtype=dtype) for _ in range(2)]
        for outer, inner in zip(wide, (inputs.student, inputs.teacher), strict=True):
            outer[1:5, 20:-20] = inner
        loss, grad = solve(
            DistillInputs(wide[0][1:5, 20:-20], wide[1][1:5, 20:-20], inputs.labels), **ALL_TERMS
        )
        clean, clean_grad = solve(inputs, **ALL_TERMS)
        assert_same_bits(loss, clean)
        assert_same_bits(grad, clean_grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_may_overwrite_the_logits(implementation: str, divergence: str) -> None:
    """What the linear form does: the backend's function, given the student's logits as the buffer."""
    run = registry.select("distill_loss", "cpu").run
    for dtype, vocab in itertools.product(DTYPES, (33, 1500, 17000)):
        inputs = made(DistillCase(3, vocab, "in place"), dtype)
        for terms in ({}, ALL_TERMS, {"softcap": 9.0}):
            o = DistillOptions(**terms, divergence=divergence)
            args = (inputs.teacher, inputs.labels, o, 0.5, 0.25)
            grad = torch.empty_like(inputs.student)
            loss = run(inputs.student, *args, grad)
            student = inputs.student.clone()
            assert_same_bits(run(student, *args, student), loss)
            assert_same_bits(student, grad)


GUARDED = """
import ctypes, itertools
import torch
from lissom import testing
from lissom.testing import DTYPES, DistillCase, distill_inputs
from lissom import registry
from lissom.reference.distill_loss import DIVERGENCES, DistillOptions

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
maps = []

def guarded(t):
    # A copy between two pages that must not be touched; it ends, or begins, at one of them.
    page, size = 4096, t.numel() * t.element_size()
    inner = -(-size // page) * page
    base = libc.mmap(None, inner + 2 * page, 3, 0x22, -1, 0)
    maps.append((base, inner + 2 * page))
    assert not libc.mprotect(base, page, 0) and not libc.mprotect(base + page + inner, page, 0)
    start = base + page + (inner - size if len(maps) % 8 else 0)
    memory = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(memory, dtype=t.dtype).view(t.shape).copy_(t)

sizes = [(1, 1), (2, 15), (1, 16), (3, 17), (2, 33), (1, 1023), (2, 1024), (1, 1040), (1, 16390)]
for i, ((rows, vocab), divergence, dtype) in enumerate(itertools.product(sizes, DIVERGENCES, DTYPES)):
    inputs = distill_inputs(DistillCase(rows, vocab, ""), dtype, DTYPES[i // 2 % 3])
    student, teacher, labels = map(guarded, (inputs.student, inputs.teacher, inputs.labels))
    grad = guarded(torch.zeros_like(inputs.student))
    every = dict(ce_weight=1.0, entropy_weight=0.1, label_smoothing=0.1, softcap=9.0, temperature=2.0)
    terms = every if i % 4 == 0 else {}
    for isa in testing.isas():
        print(isa, rows, vocab, divergence, dtype, flush=True)
        with testing.force_isa(isa):
            o = DistillOptions(divergence=divergence, **terms)
            registry.select("distill_loss", "cpu", "native").run(student, teacher, labels, o, 1.0, 1.0, grad)
    del student, teacher, labels, grad
    while maps:
        libc.munmap(*maps.pop(), 0)
print("all")
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.skipif(sys.platform != "linux", reason="mmap and mprotect are called as on Linux")
def test_kernels_touch_nothing_outside_their_tensors(run_python: RunPython) -> None:
    """Every tensor lies against an unreadable page. The last line printed tells what crashed."""
    done = run_python(GUARDED)
    assert done.returncode == 0, f"{done.stdout[-200:]}\n{done.stderr[-2000:]}"
    assert done.stdout.endswith("all\n")


# ------------------------------------------------------------------------------------------- threads, ISAs

THREAD_CASES = (DISTILL_CASES[-1], DISTILL_CASES[-2], DISTILL_CASES[10], DistillCase(3, 20001, "threads"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_number_of_threads_does_not_change_bits(native: str, divergence: str) -> None:
    for case, terms in itertools.product(THREAD_CASES, ({}, ALL_TERMS)):
        inputs = made(case)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(solve(inputs, "batchmean", divergence=divergence, **terms))
        for loss, grad in results[1:]:
            assert_same_bits(loss, results[0][0])
            assert_same_bits(grad, results[0][1])


@pytest.mark.parametrize("kind", DISTILL_KINDS)
def test_instruction_sets_agree_to_the_bit(kind: str) -> None:
    if len(testing.isas()) < 2:
        pytest.skip("fewer than two instruction sets run here")
    for vocab, divergence, dtype in itertools.product((77, 1500), DIVERGENCES, DTYPES):
        inputs = made(DistillCase(5, vocab, "ISAs"), dtype, kind=kind)
        for terms in ({}, {**ALL_TERMS, "softcap": 9.0}):
            results = []
            for isa in testing.isas():
                with testing.use(f"native-{isa}"):
                    results.append(solve(inputs, divergence=divergence, **terms))
            for loss, grad in results[1:]:
                assert_same_bits(loss, results[0][0])
                assert_same_bits(grad, results[0][1])


@pytest.mark.parametrize("rate", [1.0, 0.5, 1 / 3, 7.0])
def test_exp_is_within_its_bound(native: str, rate: float) -> None:
    """What csrc/cpu/distill_loss_kernel.h says of exp_scaled; below 2^-127 it may be 0."""
    sparse = -torch.logspace(-30, 2.4, 20001, dtype=torch.float64).float()
    x = (
        torch.cat([torch.zeros(1), sparse, -torch.rand(200_000) * 90, torch.tensor([-1e30, -math.inf])])
        / rate
    )
    x = torch.where(x.double() * rate < -87.3, torch.full_like(x, -math.inf), x)
    result = torch.full_like(x, -1.0)
    _native.load().distill_exp(x.data_ptr(), x.numel(), rate, result.data_ptr())
    exact = (x.double() * rate).exp()
    assert_within(result, exact, exact * 2 * 2.0**-23)
    nan = torch.tensor([math.nan])
    _native.load().distill_exp(nan.data_ptr(), 1, rate, nan.data_ptr())
    assert nan.isnan()


def test_rows_do_not_depend_on_each_other(native: str) -> None:
    """A row's numbers are the same alone and among others."""
    for terms in ({}, {**ALL_TERMS, "divergence": "js"}):
        inputs = made(DistillCase(70, 333, "alone"), ignored=False)
        loss, grad = solve(inputs, **terms)
        for r in (0, 31, 69):
            alone = DistillInputs(
                inputs.student[r : r + 1], inputs.teacher[r : r + 1], inputs.labels[r : r + 1]
            )
            row_loss, row_grad = solve(alone, **terms)
            assert_same_bits(row_loss, loss[r : r + 1])
            assert_same_bits(row_grad, grad[r : r + 1])


# ------------------------------------------------------------------------------------------- autograd


def leaf(inputs: DistillInputs) -> Tensor:
    return inputs.student.clone().requires_grad_()


def test_scaled_losses_scale_the_gradient(implementation: str) -> None:
    """Gradient accumulation: (loss / 4).backward(), over and over, adds up."""
    for dtype in DTYPES:
        inputs = made(DistillCase(8, 40, "scaled"), dtype, ignored=False)
        student = leaf(inputs)
        _, exact = expected(inputs, ALL_TERMS, "batchmean")
        for _ in range(4):
            (distill_loss(student, inputs.teacher, inputs.labels, **ALL_TERMS) / 4).backward()
        assert student.grad is not None
        tolerance = 4 * UNIT_ROUNDOFF[dtype] + DISTILL_TOLERANCE
        bound = tolerance * exact.abs().amax(-1, keepdim=True).expand_as(exact)
        assert_within(student.grad, exact, bound + 4 * SMALLEST_SUBNORMAL[dtype])


def test_gradients_per_row(implementation: str) -> None:
    for dtype in DTYPES:
        inputs = made(DistillCase(9, 40, "per row"), dtype)
        upstream = torch.tensor([0.0, 1.0, -2.0, 0.1, 3.0, 1e-3, 100.0, 7.0, -0.5])
        _, grad = solve(inputs, "none", upstream, **ALL_TERMS)
        exact = expected(inputs, ALL_TERMS)[1] * upstream.double()[:, None]
        bound = (2 * UNIT_ROUNDOFF[dtype] + DISTILL_TOLERANCE) * exact.abs().amax(-1, keepdim=True)
        assert_within(grad, exact, (bound + 200 * SMALLEST_SUBNORMAL[dtype]).expand_as(exact))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_retained_graph_gives_the_same_again(implementation: str, reduction: str) -> None:
    """The buffer is handed on once; after that the gradient is computed anew."""
    for dtype, factor in itertools.product(DTYPES, (1.0, 0.25)):
        inputs = made(DistillCase(8, 40, "retained"), dtype)
        student = leaf(inputs)
        loss = (distill_loss(student, inputs.teacher, inputs.labels, reduction=reduction) * factor).sum()
        grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(3)]
        kept = grads[1].clone()
        grads[0].zero_()
        assert_same_bits(grads[1], kept)
        assert_same_bits(grads[2], kept)
        assert_same_bits(torch.autograd.grad(loss, student)[0], kept)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, student)


def test_two_losses_share_their_logits(implementation: str) -> None:
    inputs = made(DistillCase(8, 40, "shared"))
    student = leaf(inputs)
    first = distill_loss(student, inputs.teacher)
    second = distill_loss(student, inputs.teacher, divergence="js")
    (first + 3 * second).backward()
    rows = DistillInputs(inputs.student, inputs.teacher, torch.zeros(8, dtype=torch.int64))
    exact = (expected(rows, {})[1] + 3 * expected(rows, {"divergence": "js"})[1]) / 8
    assert student.grad is not None
    assert_within(
        student.grad, exact, (2 * DISTILL_TOLERANCE * exact.abs().amax(-1, keepdim=True)).expand_as(exact)
    )


def test_double_backward_is_refused(implementation: str) -> None:
    for dtype in DTYPES:
        inputs = made(DistillCase(4, 20, "twice"), dtype, ignored=False)
        student = leaf(inputs)
        loss = distill_loss(student, inputs.teacher)
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        assert_same_bits(grad.detach(), solve(inputs, "batchmean")[1])
        with pytest.raises(RuntimeError, match="distill_loss: double backward is not supported"):
            grad.square().sum().backward()


def test_torch_func_is_refused(implementation: str) -> None:
    inputs = made(DistillCase(4, 20, "func"), ignored=False)

    def loss(student: Tensor) -> Tensor:
        return distill_loss(student, inputs.teacher)

    with pytest.raises(RuntimeError, match=r"distill_loss: torch\.func transforms .* not supported"):
        torch.func.grad(loss)(inputs.student)
    with pytest.raises(RuntimeError, match=r"distill_loss: torch\.func transforms .* not supported"):
        torch.func.vmap(distill_loss)(inputs.student, inputs.teacher)


def test_the_teacher_gets_no_gradient(implementation: str) -> None:
    inputs = made(DistillCase(4, 20, "teacher"), ignored=False)
    student, teacher = leaf(inputs), inputs.teacher.clone().requires_grad_()
    assert not distill_loss(inputs.student, teacher).requires_grad
    distill_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_no_gradient_where_none_is_wanted(implementation: str) -> None:
    inputs = made(DistillCase(4, 20, "no grad"), ignored=False)
    student = leaf(inputs)
    wanted = distill_loss(student, inputs.teacher)
    with torch.no_grad():
        assert not distill_loss(student, inputs.teacher).requires_grad
    with torch.inference_mode():
        loss = distill_loss(student, inputs.teacher)
    assert loss.is_inference()
    assert_same_bits(loss, wanted)


def test_through_a_model(implementation: str) -> None:
    """Parameters' gradients, with checkpointing and without, against the composition."""
    torch.manual_seed(1)
    model = torch.nn.Linear(12, 30)
    x, teacher = torch.randn(8, 12), torch.randn(8, 30)
    labels = torch.randint(30, (8,))
    composition(
        model(x).double(), teacher.double(), labels, DistillOptions(**ALL_TERMS), "batchmean"
    ).backward()
    exact = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for checkpointed in (False, True):
        model.zero_grad()

        def loss(x: Tensor) -> Tensor:
            return distill_loss(model(x), teacher, labels, **ALL_TERMS)

        if checkpointed:
            torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False).backward()
        else:
            loss(x).backward()
        for p, e in zip(model.parameters(), exact, strict=True):
            assert p.grad is not None
            assert_within(p.grad, e, (2e-6 * e.abs().max()).expand_as(e))


def test_backward_of_the_op_without_a_gradient_buffer(implementation: str) -> None:
    """``with_grad`` only says when the gradient is computed."""
    inputs = made(DistillCase(8, 40, "op"))
    for reduction in REDUCTIONS:
        student = leaf(inputs)
        args = (2.0, 1.0, 0.5, 0.1, "js", 0.3, -100, 0.1, None, 1.0, 1.0, reduction)
        grads = []
        for with_grad in (True, False):
            loss, buffer = torch.ops.lissom.distill_loss.default(
                student, inputs.teacher, inputs.labels, *args, with_grad, None
            )
            assert buffer.shape == (student.shape if with_grad else (0,))
            assert not buffer.requires_grad
            grads.append(torch.autograd.grad(loss.sum(), student)[0])
        assert_same_bits(*grads)


def test_loss_scaling_keeps_float16_gradients_from_underflow(implementation: str) -> None:
    """GradScaler's factor comes before the rounding to float16, as in the composition under autocast."""
    inputs = made(DistillCase(64, 2000, "underflow"), torch.float16, ignored=False)
    student = leaf(inputs)
    options = {"kl_weight": 0.01}
    (distill_loss(student, inputs.teacher, **options) * 2.0**16).backward()
    exact = expected(inputs, options, "batchmean")[1] * 2.0**16
    assert student.grad is not None
    assert bool((exact.abs() / 2.0**16 < 2.0**-25).double().mean() > 0.3)  # without it, these were 0
    bound = exact.abs() * (UNIT_ROUNDOFF[torch.float16] + 1e-6)
    bound += DISTILL_TOLERANCE * exact.abs().amax(-1, keepdim=True) + SMALLEST_SUBNORMAL[torch.float16]
    assert_within(student.grad, exact, bound)


def test_autocast(implementation: str) -> None:
    """Logits come as the linear under autocast gives them; the loss is float32."""
    model = torch.nn.Linear(12, 30)
    x, teacher = torch.randn(8, 12), torch.randn(8, 30)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            logits = model(x)
            logits.retain_grad()
            loss = distill_loss(logits, teacher)
        assert logits.dtype == dtype
        assert loss.dtype == torch.float32
        loss.backward()
        assert logits.grad is not None
        inputs = DistillInputs(logits.detach(), teacher, torch.zeros(8, dtype=torch.int64))
        assert_same_bits(logits.grad, solve(inputs, "batchmean")[1])


DDP = """
import os, tempfile
import torch
import torch.distributed as dist
from lissom.ops import distill_loss

store = dist.FileStore(tempfile.mktemp(), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
torch.manual_seed(0)
model = torch.nn.Linear(6, 9)
x, teacher = torch.randn(4, 6), torch.randn(4, 9)
distill_loss(model(x), teacher).backward()
alone = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
parallel = torch.nn.parallel.DistributedDataParallel(model)
for _ in range(2):
    model.zero_grad()
    distill_loss(parallel(x), teacher).backward()
print(all(torch.equal(p.grad, a) for p, a in zip(model.parameters(), alone)))
dist.destroy_process_group()
"""


def test_distributed_data_parallel(run_python: RunPython) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    done = run_python(DDP, LISSOM_BACKEND="reference")
    assert done.stdout.strip() == "True", done.stderr


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


@pytest.mark.parametrize(("dtype", "divergence"), [*zip(DTYPES, DIVERGENCES, strict=True)], ids=str)
def test_memory_beyond_the_gradient_is_o_of_rows(native: str, dtype: torch.dtype, divergence: str) -> None:
    gc.collect()  # or it may run meanwhile
    rows, vocab = 64, 20000
    inputs = made(DistillCase(rows, vocab, "memory"), dtype)
    row_bytes = 64 * rows + 4096
    buffer = rows * vocab * inputs.student.element_size()
    options = {**ALL_TERMS, "divergence": divergence, "softcap": 30.0}

    def forward() -> Tensor:
        return distill_loss(inputs.student, inputs.teacher, inputs.labels, **options)

    def backward(reduction: str, factor: float) -> Tensor:
        loss = distill_loss(student, inputs.teacher, inputs.labels, reduction=reduction, **options)
        (loss * factor).sum().backward()
        return loss  # which must not keep the gradient alive

    assert peak_memory(forward) <= row_bytes
    for reduction, factor in (("batchmean", 1.0), ("batchmean", 0.5), ("none", 1.0)):
        student = leaf(inputs)
        assert buffer <= peak_memory(functools.partial(backward, reduction, factor)) <= buffer + row_bytes


def test_the_buffer_is_let_go(implementation: str) -> None:
    """By a backward, though the loss lives on, as in a list of losses; and with the loss, without one."""
    inputs = made(DistillCase(4, 20, "let go"))
    gc.collect()
    gc.disable()
    try:
        student = leaf(inputs)
        loss = distill_loss(student, inputs.teacher)
        buffer = weakref.ref(loss.grad_fn.buffer)  # type: ignore[union-attr]
        assert buffer() is not None
        address = buffer().data_ptr()
        loss.backward()
        assert buffer() is None or buffer() is student.grad
        assert student.grad is not None
        assert student.grad.data_ptr() == address  # handed on, not copied
        loss = distill_loss(student, inputs.teacher)
        buffer = weakref.ref(loss.grad_fn.buffer)  # type: ignore[union-attr]
        del loss
        assert buffer() is None
    finally:
        gc.enable()


RESIDENT = """
import torch
from lissom.ops import distill_loss

def status(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name + ":"))

def logits(rows):
    return torch.randn(rows, 128256)

torch.set_num_threads(2)
options = dict(temperature=2.0, entropy_weight=0.1, divergence="js", softcap=30.0)
distill_loss(logits(2).requires_grad_(), logits(2), **options).backward()
student, teacher = logits(48).requires_grad_(), logits(48)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = status("VmRSS")
distill_loss(student, teacher, **options).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kernels_take_no_memory_of_their_own_worth_naming(run_python: RunPython) -> None:
    done = run_python(RESIDENT, LISSOM_BACKEND="native")
    if "clear_refs" in done.stderr:
        pytest.skip("the peak of resident memory cannot be reset here: /proc/self/clear_refs")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 48 * 128256 * 4 / 1024 + 2048  # KiB


# ------------------------------------------------------------------------------------------- bad input


def logits(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


BAD: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "vocabularies": (
        ValueError,
        r"student_logits has a vocabulary of 8 but teacher_logits of 10; .*different vocabularies or one is "
        r"padded: slice or pad .*teacher_logits\[\.\.\., :8\]",
        (logits(3, 8), logits(3, 10)),
        {},
    ),
    "padded student": (ValueError, r"student_logits\[\.\.\., :8\]", (logits(3, 10), logits(3, 8)), {}),
    "rows": (ValueError, r"\(3, 8\) but teacher_logits \(4, 8\)", (logits(3, 8), logits(4, 8)), {}),
    "leading": (ValueError, r"\(2, 3, 8\) but teacher_logits \(6, 8\)", (logits(2, 3, 8), logits(6, 8)), {}),
    "scalar teacher": (ValueError, r"but teacher_logits \(\)", (logits(3, 8), logits()), {}),
    "scalar": (ValueError, r"has shape \(\); it must be \[\.\.\., V\]", (logits(), logits()), {}),
    "no words": (ValueError, r"has shape \(3, 0\)", (logits(3, 0), logits(3, 0)), {}),
    "float64": (
        TypeError,
        r"student_logits has dtype torch\.float64; .*student_logits\.float\(\)",
        (logits(3, 8, dtype=torch.float64), logits(3, 8)),
        {},
    ),
    "float64 teacher": (
        TypeError,
        r"teacher_logits has dtype torch\.float64; .*teacher_logits\.float\(\)",
        (logits(3, 8), logits(3, 8, dtype=torch.float64)),
        {},
    ),
    "integers": (TypeError, r"dtype torch\.int64", (logits(3, 8, dtype=torch.int64), logits(3, 8)), {}),
    "devices": (
        ValueError,
        r"teacher_logits is on meta but student_logits is on cpu; use "
        r"teacher_logits\.to\(student_logits\.device\)",
        (logits(3, 8), logits(3, 8, device="meta")),
        {},
    ),
    "labels' device": (
        ValueError,
        r"labels is on meta but student_logits is on cpu",
        (logits(3, 8), logits(3, 8), torch.zeros(3, dtype=torch.int64, device="meta")),
        {},
    ),
    "no teacher": (
        ValueError,
        r"teacher_logits is None but kl_weight=1\.0; give .* or kl_weight=0",
        (logits(3, 8),),
        {},
    ),
    "no labels": (
        ValueError,
        r"labels is None but ce_weight=0\.5; give labels, or ce_weight=0",
        (logits(3, 8), logits(3, 8)),
        {"ce_weight": 0.5},
    ),
    "label shape": (
        ValueError,
        r"labels has shape \(3, 1\) but student_logits \(3, 8\); it must be \(3,\)",
        (logits(3, 8), logits(3, 8), torch.zeros(3, 1, dtype=torch.int64)),
        {},
    ),
    "label dtype": (
        TypeError,
        r"labels has dtype torch\.float32; use torch\.int64",
        (logits(3, 8), logits(3, 8), torch.zeros(3)),
        {},
    ),
    "label too large": (
        ValueError,
        r"labels\[2\] is 8, which is not in \[0, 8\); .*ignore_index=-100",
        (logits(3, 8), logits(3, 8), torch.tensor([0, -100, 8])),
        {},
    ),
    "label negative": (
        ValueError,
        r"labels\[1, 0\] is -1, .*ignore_index=-100",
        (logits(2, 2, 8), logits(2, 2, 8), torch.tensor([[0, 1], [-1, 2]], dtype=torch.int32)),
        {"ce_weight": 1.0},
    ),
}
for _name, _value, _pattern in (
    ("temperature", 0.0, r"temperature=0\.0 must be positive"),
    ("temperature", -1.0, r"temperature=-1\.0 must be positive"),
    ("temperature", math.nan, r"temperature=nan must be positive"),
    ("temperature", math.inf, r"temperature=inf must be positive and finite"),
    (
        "divergence",
        "backward",
        r"divergence='backward' is unknown; use one of \('forward', 'reverse', 'js'\)",
    ),
    ("reduction", "average", r"reduction='average' is unknown; use one of \('batchmean', "),
    ("softcap", 0.0, r"softcap=0\.0 must be positive and finite; use None"),
    ("softcap", -3.0, r"softcap=-3\.0 must be positive"),
    ("label_smoothing", 1.5, r"label_smoothing=1\.5 must be in \[0, 1\]"),
    ("label_smoothing", math.nan, r"label_smoothing=nan must be in"),
    ("kl_weight", math.nan, r"kl_weight=nan must be finite"),
    ("ce_weight", math.inf, r"ce_weight=inf must be finite"),
    ("entropy_weight", math.nan, r"entropy_weight=nan must be finite"),
    ("student_scale", math.inf, r"student_scale=inf must be finite"),
    ("teacher_scale", math.nan, r"teacher_scale=nan must be finite"),
):
    BAD[f"{_name}={_value}"] = (ValueError, _pattern, (logits(3, 8), logits(3, 8)), {_name: _value})
for _beta in (0.0, 1.0, -0.5, math.nan):
    BAD[f"js_beta={_beta}"] = (
        ValueError,
        rf"js_beta={_beta} must lie between 0 and 1; .*'forward' or 'reverse'",
        (logits(3, 8), logits(3, 8)),
        {"divergence": "js", "js_beta": _beta},
    )


@pytest.mark.parametrize("name", BAD)
def test_bad_input(implementation: str, name: str) -> None:
    error, pattern, tensors, options = BAD[name]
    with pytest.raises(error, match=rf"distill_loss: .*{pattern}"):
        distill_loss(*tensors, **options)


def test_bad_backend() -> None:
    with pytest.raises(ValueError, match="backend='cuda' does not exist for device 'cpu'"):
        distill_loss(logits(3, 8), logits(3, 8), backend="cuda")


def test_backend_may_be_named(implementation: str) -> None:
    inputs = made(DistillCase(4, 20, "backend"))
    backend = implementation.partition("-")[0]
    assert_same_bits(
        distill_loss(inputs.student, inputs.teacher, backend=backend),
        distill_loss(inputs.student, inputs.teacher),
    )


def test_native_serves() -> None:
    if _native.unavailable_reason():
        pytest.skip(f"native kernels: {_native.unavailable_reason()}")
    assert testing.backends("distill_loss")[0] == "native"
