"""The Triton kernels of ``distill_loss``, held to the CPU tests' float64 page.

On a GPU, or in Triton's interpreter, whose float64 and exp2 are NumPy's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import distill_checks as shared
import pytest
import test_distill_loss as cpu
import torch
from torch import Tensor

from lissom import _triton, registry, testing
from lissom.ops import distill_loss
from lissom.reference.distill_loss import DIVERGENCES, DistillOptions
from lissom.testing import (
    DISTILL_CASES,
    DISTILL_KINDS,
    DTYPES,
    UNIT_ROUNDOFF,
    VIEWS,
    DistillCase,
    DistillInputs,
    assert_same_bits,
    assert_within,
)

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

MOST_ROWS, MOST_LOGITS = 70, 2100
"""In the interpreter; a GPU takes every case."""


@pytest.fixture(autouse=True)
def on_triton(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every call is Triton's; on a GPU ``solve`` moves its inputs there and its results back."""

    monkeypatch.setattr(cpu, "solve", shared.solve_on(triton_device))
    with testing.use("triton"):
        yield triton_device


def run(
    inputs: DistillInputs, device: str, term_scale: Any = 1.0, ce_scale: Any = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernels as the op calls them: losses and gradient, on the device."""
    student = inputs.student.to(device)
    grad = torch.full_like(student, 7.0)
    loss = _triton.load("distill_loss").distill_loss(
        student,
        inputs.teacher.to(device),
        inputs.labels.to(device),
        term_scale,
        ce_scale,
        grad,
        **vars(DistillOptions(**options)),
    )
    return loss, grad


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", DISTILL_CASES, ids=str)
def test_every_case(on_triton: str, case: DistillCase) -> None:
    turns = [*itertools.product(DIVERGENCES, ({}, cpu.ALL_TERMS))]
    if on_triton == "cpu":
        vocab = min(case.vocab, MOST_LOGITS)
        case = DistillCase(min(case.rows, MOST_ROWS, max(1, MOST_LOGITS // vocab)), vocab, case.why)
        turns = turns if vocab < 1000 else [turns[0], turns[3], turns[4]]
    for i, (divergence, terms) in enumerate(turns):
        dtype = DTYPES[(i // 2 if case.vocab < 10000 else 0) % 3]
        cpu.check_kind(cpu.made(case, dtype), {**terms, "divergence": divergence}, "normal", case)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", cpu.OPTIONS)
def test_every_option(name: str, divergence: str) -> None:
    options = {**cpu.OPTIONS[name], "divergence": divergence}
    dtype = DTYPES[list(cpu.OPTIONS).index(name) % 3]
    cpu.check(cpu.made(DistillCase(7, 75, "options"), dtype), options)


def test_several_tiles() -> None:
    """The last one is in registers while the others are read again, from the end."""
    for divergence, name in itertools.product(DIVERGENCES, ("temperature", "everything")):
        options = {**cpu.OPTIONS[name], "divergence": divergence}
        cpu.check(cpu.made(DistillCase(2, 4500, "tiles"), torch.bfloat16), options)


@pytest.mark.parametrize(
    ("divergence", "terms"), [("forward", cpu.ALL_TERMS), ("reverse", cpu.ALL_TERMS), ("js", {})], ids=str
)
def test_long_rows_are_split(on_triton: str, divergence: str, terms: dict[str, Any]) -> None:
    """Rows of which there are fewer than multiprocessors: a program per part, a launch per stage."""
    inputs = cpu.made(DistillCase(2, 16411, "split"))
    cpu.check(inputs, {**terms, "divergence": divergence, "label_smoothing": 0.1})
    labels = torch.tensor([-100, 5])
    options = {**terms, "divergence": divergence}
    cpu.check(DistillInputs(inputs.student, inputs.teacher, labels), options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", DISTILL_KINDS)
def test_every_kind_of_logits(kind: str, divergence: str) -> None:
    if kind == "masked_teacher" and divergence == "reverse":
        kind = "masked_both"  # the other is infinite
    for terms, vocab, dtype in (
        ({}, 77, torch.float32),
        (cpu.ALL_TERMS, 60, torch.float32),
        ({"temperature": 4.0, "ce_weight": 1.0}, 40, DTYPES[1 + DIVERGENCES.index(divergence) % 2]),
    ):
        case = DistillCase(5, vocab, "kinds")
        cpu.check_kind(cpu.made(case, dtype, kind=kind), {**terms, "divergence": divergence}, kind, case)


@pytest.mark.parametrize("kind", DISTILL_KINDS)
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_an_exp2_that_is_two_units_off(
    on_triton: str, divergence: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GPU's may be, up or down by the bits of the exponent: all is within its bounds still."""
    if on_triton != "cpu":
        pytest.skip("exp2 can be exchanged in the interpreter only")
    import numpy as np
    from triton.runtime import interpreter

    def exp2(_: Any, x: Any) -> Any:
        y = np.exp2(x.data)
        if y.dtype == np.float32:
            at = x.data.view(np.int32)
            sign = np.where(((at ^ (at >> 7)) & 1) != 0, 1.0, -1.0) * (np.abs(x.data) > 2.0**-20)
            y = (y.astype(np.float64) * (1 + sign * 2.0**-22)).astype(np.float32)
        return interpreter.TensorHandle(y, x.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", exp2)
    if kind == "masked_teacher" and divergence == "reverse":
        return
    for terms, vocab in (({}, 60), (cpu.ALL_TERMS, 60), ({"temperature": 3.0}, 700), ({}, 8)):
        case = DistillCase(5, vocab, "kinds")
        cpu.check_kind(cpu.made(case, kind=kind), {**terms, "divergence": divergence}, kind, case)


test_randomized = shared.test_randomized


test_reductions = shared.test_reductions


test_nothing_counts = shared.test_nothing_counts


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(divergence: str, where: str) -> None:
    for bad, terms, vocab in ((math.nan, {}, 2100), (math.inf, cpu.ALL_TERMS, 70)):
        inputs = cpu.made(DistillCase(3, vocab, "NaN"), ignored=False)
        options = {**terms, "divergence": divergence}
        clean, clean_grad = cpu.solve(inputs, **options)
        tensors = {"student": inputs.student.clone(), "teacher": inputs.teacher.clone()}
        tensors[where][1, vocab // 2] = bad
        loss, grad = cpu.solve(DistillInputs(**tensors, labels=inputs.labels), **options)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert_same_bits(loss[[0, 2]], clean[[0, 2]])
        assert_same_bits(grad[[0, 2]], clean_grad[[0, 2]])


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_masked_all_over_are_nan(divergence: str, where: str) -> None:
    cpu.test_rows_masked_all_over_are_nan("triton", divergence, where)


def test_nan_in_ce_and_entropy_alone() -> None:
    cpu.test_nan_in_ce_and_entropy_alone("triton")


def test_infinite_divergence() -> None:
    cpu.test_infinite_divergence("triton")


test_one_side_masks_and_the_other_gives_nothing = shared.test_one_side_masks_and_the_other_gives_nothing


def test_reverse_kl_of_rows_that_begin_with_what_the_teacher_masks() -> None:
    """Its sums are infinite until a tile, or a part, has an element that counts."""
    for vocab, padding, terms in ((4500, 3100, cpu.ALL_TERMS), (16411, 9000, {})):
        inputs = cpu.made(DistillCase(2, vocab, "padding"), ignored=False)
        student, teacher = inputs.student.clone(), inputs.teacher.clone()
        student[:, :padding], teacher[:, :padding] = -1e4, -math.inf
        cpu.check(
            DistillInputs(student, teacher, inputs.labels % (vocab - padding) + padding),
            {**terms, "divergence": "reverse"},
        )


def test_label_that_is_masked() -> None:
    cpu.test_label_that_is_masked("triton")


test_masked_logits_without_a_teacher = shared.test_masked_logits_without_a_teacher


def test_labels_out_of_range(on_triton: str) -> None:
    """Raised for where labels are on the CPU; on a GPU, where nobody waits to see them, NaN rows."""
    inputs = cpu.made(DistillCase(5, 30, "labels"), ignored=False)
    labels = inputs.labels.clone()
    labels[1], labels[3] = 30, -1
    for options in ({}, {"ce_weight": 1.0}, {"ce_weight": 1.0, "divergence": "js"}):
        loss, grad = run(DistillInputs(inputs.student, inputs.teacher, labels), on_triton, **options)
        assert loss.isnan().tolist() == [False, True, False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False, True, False]
        assert grad[[0, 2, 4]].isfinite().all()
    student, teacher = inputs.student.to(on_triton), inputs.teacher.to(on_triton)
    if on_triton == "cpu":
        with pytest.raises(ValueError, match=r"labels\[1\] is 30, which is not in \[0, 30\)"):
            distill_loss(student, teacher, labels)
    else:
        assert distill_loss(student, teacher, labels.to(on_triton)).isnan()


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_ignored_rows_count_in_no_term(ignore_index: int) -> None:
    cpu.test_ignored_rows_count_in_no_term("triton", ignore_index, torch.int32)


def test_ignored_rows_of_several_tiles_are_zero() -> None:
    inputs = cpu.made(DistillCase(3, 4300, "ignored"))
    student = inputs.student.clone()
    student[1] = math.nan
    labels = torch.tensor([7, -100, 8])
    for divergence in DIVERGENCES:
        loss, grad = cpu.solve(DistillInputs(student, inputs.teacher, labels), divergence=divergence)
        assert loss[1] == 0
        assert not grad[1].any()
        assert loss[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", VIEWS)
def test_strides(name: str) -> None:
    cpu.test_strides("triton", name)


def test_leading_dimensions() -> None:
    for shape in ((9,), (2, 3, 9), (2, 1, 4, 9)):
        cpu.test_leading_dimensions("triton", shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_may_differ(dtype: torch.dtype) -> None:
    for teacher_dtype, divergence in zip(DTYPES, DIVERGENCES, strict=True):
        inputs = cpu.made(DistillCase(5, 70, "dtypes"), dtype, teacher_dtype)
        cpu.check(inputs, {**cpu.ALL_TERMS, "divergence": divergence})


def test_neighbours_in_memory_have_no_influence() -> None:
    for vocab, dtype in ((5, torch.float16), (33, torch.float32), (2070, torch.bfloat16)):
        inputs = cpu.made(DistillCase(3, vocab, "neighbours"), dtype)
        wide = [torch.full((5, vocab + 41), math.nan, dtype=dtype) for _ in range(2)]
        for outer, inner in zip(wide, (inputs.student, inputs.teacher), strict=True):
            outer[1:4, 21:-20] = inner
        student, teacher = (outer[1:4, 21:-20] for outer in wide)
        for terms in ({}, cpu.ALL_TERMS):
            loss, grad = cpu.solve(DistillInputs(student, teacher, inputs.labels), **terms)
            clean, clean_grad = cpu.solve(inputs, **terms)
            assert_same_bits(loss, clean)
            assert_same_bits(grad, clean_grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_may_overwrite_the_logits(on_triton: str, divergence: str) -> None:
    """What the linear form does: the backend's function, given the student's logits as the buffer."""
    backend = registry.select("distill_loss", on_triton, "triton").run
    for dtype, vocab in ((torch.float16, 33), (torch.bfloat16, 2100), (torch.float32, 16400)):
        inputs = cpu.made(DistillCase(2, vocab, "in place"), dtype)
        teacher, labels = inputs.teacher.to(on_triton), inputs.labels.to(on_triton)
        for terms in ({}, cpu.ALL_TERMS) if vocab < 100 else ({"ce_weight": 0.5},):
            args = (teacher, labels, DistillOptions(**terms, divergence=divergence), 0.5, 0.25)
            student = inputs.student.to(on_triton, copy=True)
            grad = torch.empty_like(student)
            loss = backend(student, *args, grad)
            assert_same_bits(student.cpu(), inputs.student)
            assert_same_bits(backend(student, *args, student), loss)
            assert_same_bits(student, grad)


# ------------------------------------------------------------------------------------------- factors


def test_factors_on_the_device(on_triton: str) -> None:
    """Of a GPU's labels nobody knows how many count: the kernels read the reduction's factors there."""
    for divergence, terms in itertools.product(DIVERGENCES, ({}, {**cpu.ALL_TERMS, "softcap": 9.0})):
        inputs = cpu.made(DistillCase(5, 60, "factors"), torch.bfloat16)
        options = {**terms, "divergence": divergence}
        scales = [torch.tensor(x, dtype=torch.float64, device=on_triton) for x in (0.125, 0.5)]
        loss, grad = run(inputs, on_triton, *scales, **options)
        same_loss, same_grad = run(inputs, on_triton, 0.125, 0.5, **options)
        torch.testing.assert_close(loss, same_loss, rtol=1e-12, atol=0)
        assert_same_bits(grad, same_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_rows(on_triton: str, dtype: torch.dtype) -> None:
    scale = _triton.load("distill_loss").scale_rows
    for rows, vocab in ((1, 1), (5, 130), (2, 20000), (0, 5)):
        grad = torch.randn(rows, vocab + 3).to(dtype).to(on_triton)[:, :vocab]
        kept, factors = grad.clone(), torch.linspace(-2, 2, rows, device=on_triton)
        scale(grad, factors)
        assert_same_bits(grad, (kept.float() * factors[:, None]).to(dtype))
        scale(grad, torch.ones((), device=on_triton))
        assert_same_bits(grad, (kept.float() * factors[:, None]).to(dtype))
        scale(grad, torch.tensor(0.5, dtype=torch.float64, device=on_triton))
        assert_same_bits(grad, ((kept.float() * factors[:, None]).to(dtype).float() * 0.5).to(dtype))


# ------------------------------------------------------------------------------------------- autograd


def leaf(inputs: DistillInputs, device: str) -> Tensor:
    return inputs.student.to(device, copy=True).requires_grad_()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_retained_graph_gives_the_same_again(on_triton: str, reduction: str) -> None:
    for dtype, factor in itertools.product(DTYPES, (1.0, 0.25)):
        inputs = cpu.made(DistillCase(8, 40, "retained"), dtype)
        student = leaf(inputs, on_triton)
        teacher, labels = inputs.teacher.to(on_triton), inputs.labels.to(on_triton)
        loss = (distill_loss(student, teacher, labels, reduction=reduction) * factor).sum()
        grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(3)]
        kept = grads[1].clone()
        grads[0].zero_()
        assert_same_bits(grads[1], kept)
        assert_same_bits(grads[2], kept)


def test_gradients_per_row() -> None:
    cpu.test_gradients_per_row("triton")


def test_loss_scaling_keeps_float16_gradients_from_underflow(on_triton: str) -> None:
    inputs = cpu.made(DistillCase(16, 2000, "underflow"), torch.float16, ignored=False)
    student = leaf(inputs, on_triton)
    (distill_loss(student, inputs.teacher.to(on_triton), kl_weight=0.01) * 2.0**16).backward()
    exact = cpu.expected(inputs, {"kl_weight": 0.01}, "batchmean")[1] * 2.0**16
    assert student.grad is not None
    bound = exact.abs() * (UNIT_ROUNDOFF[torch.float16] + 1e-6) + 1e-6 * exact.abs().amax(-1, keepdim=True)
    assert_within(student.grad.cpu(), exact, bound + 2.0**-24)


def test_double_backward_is_refused(on_triton: str) -> None:
    inputs = cpu.made(DistillCase(4, 20, "twice"), ignored=False)
    student = leaf(inputs, on_triton)
    loss = distill_loss(student, inputs.teacher.to(on_triton))
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="distill_loss: double backward is not supported"):
        grad.square().sum().backward()


def test_the_gradient_is_handed_on(on_triton: str) -> None:
    """Not copied; nor is a loss without a gradient kept from having the same bits."""
    inputs = cpu.made(DistillCase(4, 20, "handed on"), ignored=False)
    student, teacher = leaf(inputs, on_triton), inputs.teacher.to(on_triton)
    loss = distill_loss(student, teacher)
    address = loss.grad_fn.buffer.data_ptr()  # type: ignore[union-attr]
    loss.backward()
    assert student.grad is not None
    assert student.grad.data_ptr() == address
    assert_same_bits(distill_loss(student.detach(), teacher), loss.detach())


# ------------------------------------------------------------------------------------------- the operator


def test_opcheck(on_triton: str) -> None:
    inputs = cpu.made(DistillCase(5, 20, "opcheck"))
    student, teacher, labels = (
        leaf(inputs, on_triton),
        *(x.to(on_triton) for x in (inputs.teacher, inputs.labels)),
    )
    options = (2.0, 1.0, 0.5, 0.1, "js", 0.3, -100, 0.1, None, 1.0, 1.0, "batchmean")
    op, grad = torch.ops.lissom.distill_loss.default, torch.ops.lissom.distill_loss_grad.default
    result = torch.library.opcheck(op, (student, teacher, labels, *options, True, "triton"))
    assert set(result.values()) == {"SUCCESS"}
    grad_loss = torch.tensor(0.5, device=on_triton)
    result = torch.library.opcheck(grad, (grad_loss, student.detach(), teacher, labels, *options, "triton"))
    assert set(result.values()) == {"SUCCESS"}


def test_which_backend(on_triton: str) -> None:
    """On a GPU it is the first; of CPU tensors the interpreter serves only who names it."""
    names = testing.backends("distill_loss", on_triton)
    assert names[0 if on_triton == "cuda" else -1] == "triton"
    assert registry.select("distill_loss", on_triton, "triton").name == "triton"
    used = [row["backend"] for row in registry.backend_info() if row["op"] == "distill_loss"]
    assert used.count("triton") == (2 if on_triton == "cpu" else 1)


def test_nothing_waits_for_the_gpu(on_triton: str) -> None:
    """Neither labels nor incoming gradients are looked at; and so a CUDA graph can be captured."""
    if on_triton != "cuda":
        pytest.skip("needs a CUDA GPU")
    for dtype, reduction in itertools.product(DTYPES, cpu.REDUCTIONS):
        inputs = cpu.made(DistillCase(6, 3000, "sync"), dtype)
        student = leaf(inputs, "cuda")
        teacher, labels = inputs.teacher.cuda(), inputs.labels.cuda()

        def step() -> Tensor:
            loss = distill_loss(student, teacher, labels, ce_weight=0.5, reduction=reduction)  # noqa: B023
            (grad,) = torch.autograd.grad(loss.sum() * 0.5, student)  # noqa: B023
            return grad

        expected = step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected)
