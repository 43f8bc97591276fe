"""The Triton kernels of ``distill_loss`` and ``linear_distill_loss``, held to the CPU tests' float64 page.

On a GPU, or in Triton's interpreter, whose float64 and exp2 are NumPy's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import test_distill_loss as cpu
import torch
from torch import Tensor

from lissom import testing
from lissom.ops import distill_loss, linear_distill_loss
from lissom.reference.distill_loss import DIVERGENCES
from lissom.testing import DISTILL_CASES, DISTILL_KINDS, DTYPES, DistillCase, assert_same_bits

pytestmark = pytest.mark.triton

MOST_LOGITS = 4000
"""In the interpreter; a GPU takes every case."""


@pytest.fixture(autouse=True)
def on_triton(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every call is Triton's; on a GPU ``solve`` moves its inputs there and its results back."""

    def solve(
        inputs: testing.DistillInputs, reduction: str = "none", upstream: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        student = inputs.student.detach().to(triton_device).requires_grad_()
        teacher, labels = inputs.teacher.to(triton_device), inputs.labels.to(triton_device)
        loss = distill_loss(student, teacher, labels, reduction=reduction, **options)
        given = torch.ones_like(loss) if upstream is None else upstream.to(triton_device)
        (grad,) = torch.autograd.grad(loss, student, given)
        return loss.detach().cpu(), grad.cpu()

    monkeypatch.setattr(cpu, "solve", solve)
    with testing.use("triton"):
        yield triton_device


@pytest.mark.parametrize("case", DISTILL_CASES, ids=str)
def test_every_case(on_triton: str, case: DistillCase) -> None:
    if on_triton == "cpu" and case.rows * case.vocab > MOST_LOGITS:
        case = DistillCase(max(1, MOST_LOGITS // case.vocab), min(case.vocab, MOST_LOGITS), case.why)
    turns = itertools.product(DIVERGENCES, ({}, cpu.ALL_TERMS))
    for i, (divergence, terms) in enumerate(turns):
        dtype = DTYPES[i // 2 % 3]
        cpu.check_kind(cpu.made(case, dtype), {**terms, "divergence": divergence}, "normal", case)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", cpu.OPTIONS)
def test_every_option(name: str, divergence: str) -> None:
    options = {**cpu.OPTIONS[name], "divergence": divergence}
    for dtype in DTYPES:
        cpu.check(cpu.made(DistillCase(7, 75, "options"), dtype), options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", DISTILL_KINDS)
def test_every_kind_of_logits(kind: str, divergence: str) -> None:
    if kind == "masked_teacher" and divergence == "reverse":
        kind = "masked_both"  # the other is infinite
    for terms in ({}, cpu.ALL_TERMS, {"temperature": 4.0}):
        for case, dtype in (
            (DistillCase(9, 77, "kinds"), torch.float32),
            (DistillCase(9, 40, "kinds"), torch.bfloat16),
        ):
            cpu.check_kind(cpu.made(case, dtype, kind=kind), {**terms, "divergence": divergence}, kind, case)


@pytest.mark.parametrize("reduction", cpu.REDUCTIONS)
def test_reductions(on_triton: str, reduction: str) -> None:
    inputs = cpu.made(DistillCase(7, 61, "reductions"))
    loss, grad = cpu.solve(inputs, reduction, **cpu.ALL_TERMS)
    row_loss, exact = cpu.expected(inputs, cpu.ALL_TERMS, reduction)
    total = row_loss if reduction == "none" else row_loss.sum()
    torch.testing.assert_close(loss.double(), total, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(on_triton: str, divergence: str) -> None:
    inputs = cpu.made(DistillCase(5, 40, "nan"), ignored=False)
    student = inputs.student.clone().to(on_triton)
    student[2, 7] = math.nan
    student.requires_grad_()
    loss = distill_loss(student, inputs.teacher.to(on_triton), reduction="none", divergence=divergence)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert student.grad is not None
    assert student.grad.isnan().all(-1).tolist() == [False, False, True, False, False]
    assert not student.grad[[0, 1, 3, 4]].isnan().any()


def test_ignored_rows_and_strides(on_triton: str) -> None:
    inputs = cpu.made(DistillCase(6, 50, "strides"), ignored=False)
    labels = inputs.labels.clone().to(on_triton)
    labels[1] = -100
    wide = torch.zeros(6, 60, device=on_triton)
    wide[:, 5:55] = inputs.student.to(on_triton)
    teacher = inputs.teacher.to(on_triton)
    results = []
    for student in (wide[:, 5:55], wide[:, 5:55].contiguous(), wide[:, 5:55].t().contiguous().t()):
        z = student.detach().requires_grad_()
        loss = distill_loss(z, teacher, labels, ce_weight=0.5)
        (grad,) = torch.autograd.grad(loss, z)
        assert not grad[1].any()
        results.append((loss.detach(), grad.contiguous()))
    for loss, grad in results[1:]:
        assert_same_bits(loss, results[0][0])
        assert_same_bits(grad, results[0][1])


def test_label_that_is_masked() -> None:
    cpu.test_label_that_is_masked("triton")


def test_no_rows(on_triton: str) -> None:
    student = torch.zeros(0, 7, device=on_triton, requires_grad=True)
    loss = distill_loss(student, torch.zeros(0, 7, device=on_triton), reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.shape == (0, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", ["hidden", "logits", "topk"])
def test_linear(on_triton: str, teacher: str, dtype: torch.dtype) -> None:
    """Against the reference backend on the same tensors, in several chunks of rows."""
    rows, hidden, vocab = 11, 24, 90
    labels = torch.randint(vocab, (rows,)).to(on_triton)
    labels[3] = -100
    of_teacher: dict[str, Any] = {
        "hidden": {"teacher_hidden": torch.randn(rows, 16), "teacher_weight": torch.randn(vocab, 16)},
        "logits": {"teacher_logits": torch.randn(rows, vocab) * 3},
        "topk": {},
    }[teacher]
    of_teacher = {name: tensor.to(on_triton, dtype) for name, tensor in of_teacher.items()}
    if teacher == "topk":
        log_probs, indices = torch.randn(rows, vocab).mul(3).log_softmax(-1).topk(5)
        of_teacher = {"teacher_topk": (log_probs.to(on_triton), indices.to(on_triton))}
    x, w, b = torch.randn(rows, hidden), torch.randn(vocab, hidden) * 0.3, torch.randn(vocab)
    found = []
    for backend in ("triton", "reference"):
        given = [t.to(on_triton, dtype).requires_grad_() for t in (x, w, b)]
        with testing.use(backend):
            loss = linear_distill_loss(
                *given,
                labels=labels,
                temperature=2.0,
                ce_weight=0.5,
                entropy_weight=0.2,
                memory_budget=4 * vocab * 4,
                **of_teacher,
            )
            loss.backward()
        found.append([loss.detach(), *(t.grad for t in given)])
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for mine, reference in zip(*found, strict=True):
        assert (mine.dtype, mine.shape) == (reference.dtype, reference.shape)
        error = (mine.double() - reference.double()).abs().max()
        assert error <= tolerance * reference.double().abs().max()
