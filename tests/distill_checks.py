"""What tests of ``distill_loss`` on a GPU share: ``solve`` on a device, and tests that each file takes as
they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import test_distill_loss as cpu
import torch
from torch import Tensor

from lissom.ops import distill_loss
from lissom.reference.distill_loss import DIVERGENCES
from lissom.testing import (
    DISTILL_TOLERANCE,
    DTYPES,
    SMALLEST_SUBNORMAL,
    UNIT_ROUNDOFF,
    DistillCase,
    DistillInputs,
    assert_same_bits,
    assert_within,
)


def solve_on(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """In place of the CPU tests' ``solve``: moves its inputs to ``device`` and its results back."""

    def solve(
        inputs: DistillInputs, reduction: str = "none", upstream: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        student = inputs.student.detach().to(device).requires_grad_()
        teacher, labels = inputs.teacher.to(device), inputs.labels.to(device)
        loss = distill_loss(student, teacher, labels, reduction=reduction, **options)
        given = torch.ones_like(loss) if upstream is None else upstream.to(device)
        (grad,) = torch.autograd.grad(loss, student, given)
        return loss.detach().cpu(), grad.cpu()

    return solve


def test_masked_logits_without_a_teacher() -> None:
    for kind, options in itertools.product(
        ("masked_both", "normal"),
        ({"ce_weight": 1.0}, {"entropy_weight": 1.0}, {"ce_weight": 1.0, "temperature": 2.0}),
    ):
        inputs = cpu.made(DistillCase(5, 90, "no teacher"), kind=kind)
        cpu.check(inputs, {**options, "kl_weight": 0.0})


def test_randomized() -> None:
    for seed in range(1000, 1015):
        options = cpu.random_options(seed)
        case = DistillCase(1 + seed % 5, 2 + seed * 37 % 130, "random")
        kind = ("normal", "close", "peaked")[seed // 3 % 3]
        cpu.check_kind(
            cpu.made(case, DTYPES[seed % 2], kind=kind, seed=seed), options, kind, f"{seed=} {case}"
        )


@pytest.mark.parametrize("reduction", cpu.REDUCTIONS)
def test_reductions(reduction: str) -> None:
    for divergence, dtype in zip(DIVERGENCES, DTYPES, strict=True):
        inputs = cpu.made(DistillCase(13, 37, "reductions"), dtype)
        options = {**cpu.ALL_TERMS, "divergence": divergence}
        loss, grad = cpu.solve(inputs, reduction, **options)
        row_loss, exact = cpu.expected(inputs, options, reduction)
        total = row_loss if reduction == "none" else row_loss.sum()
        torch.testing.assert_close(loss.double(), total, rtol=DISTILL_TOLERANCE, atol=0)
        bound = DISTILL_TOLERANCE * exact.abs().amax(-1, keepdim=True)
        bound = bound + (exact.abs() * UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 0)
        assert_within(grad, exact, (bound + SMALLEST_SUBNORMAL[dtype]).expand_as(exact))


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("reduction", cpu.REDUCTIONS)
def test_nothing_counts(reduction: str, rows: int) -> None:
    inputs = cpu.made(DistillCase(rows, 7, "nothing counts"))
    inputs = DistillInputs(inputs.student, inputs.teacher, torch.full((rows,), -100))
    loss, grad = cpu.solve(inputs, reduction, **cpu.ALL_TERMS)
    wanted = torch.zeros(rows) if reduction == "none" else torch.tensor(0.0)
    if reduction in ("mean", "batchmean"):
        wanted.fill_(math.nan)
    assert_same_bits(loss, wanted)
    assert_same_bits(grad, torch.zeros(rows, 7))


def test_one_side_masks_and_the_other_gives_nothing() -> None:
    """A teacher that has padding at -1e4 instead of -inf: 0 log 0 all the same, in each divergence."""
    inputs = cpu.made(DistillCase(3, 40, "padding"), ignored=False)
    student, teacher = inputs.student.clone(), inputs.teacher.clone()
    student[:, 30:], teacher[:, 30:] = -math.inf, -1e4
    labels = inputs.labels % 30
    for divergence, terms in itertools.product(DIVERGENCES, ({}, cpu.ALL_TERMS)):
        pair = (student, teacher) if divergence != "reverse" else (teacher, student)
        loss, grad = cpu.solve(DistillInputs(*pair, labels), divergence=divergence, **terms)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        cpu.check(DistillInputs(*pair, labels), {**terms, "divergence": divergence})
