"""``linear_distill_loss`` on Triton's kernels: held to its float64 page, as on the CPU.

On a GPU, or in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_linear_distill_loss as cpu
import torch
from torch import Tensor

from lissom import _triton, testing
from lissom.ops.distill_loss import REDUCTIONS
from lissom.reference import distill_loss as page
from lissom.reference.distill_loss import DIVERGENCES, DistillOptions
from lissom.testing import DTYPES, DistillCase, assert_same_bits, distill_inputs

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True)
def on_triton(triton_device: str) -> Iterator[str]:
    with testing.use("triton"):
        yield triton_device


def on_device(inputs: cpu.Inputs, device: str) -> cpu.Inputs:
    """Copies there; leaves that require grad still do."""

    def move(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(move(part) for part in x)
        return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return cpu.Inputs(
        move(inputs.hidden),
        move(inputs.weight),
        move(inputs.bias),
        {name: move(x) for name, x in inputs.teacher.items()},
        move(inputs.labels),
    )


def check(inputs: cpu.Inputs, device: str, reduction: str = "batchmean", **options: Any) -> None:
    """Loss and all gradients, with an incoming gradient that is not 1, against the page."""
    budget = options.pop("memory_budget", None)
    given = on_device(inputs.trained(), device)
    loss = given.loss(reduction=reduction, memory_budget=budget, **options)
    assert (loss.dtype, loss.device.type) == (torch.float32, torch.device(device).type)
    incoming = torch.linspace(-0.5, 1.5, loss.numel()).view(loss.shape) if loss.dim() else torch.tensor(0.7)
    gradients = torch.autograd.grad(loss, given.leaves(), incoming.to(device))
    factors = incoming.flatten().expand(inputs.labels.numel())
    exact, exact_gradients = cpu.expected(inputs, reduction, factors, **options)
    rtol = cpu.TOLERANCE[inputs.hidden.dtype]
    cpu.assert_close(loss.detach().cpu(), exact, rtol)
    for leaf, gradient, right in zip(inputs.leaves(), gradients, exact_gradients, strict=False):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
        cpu.assert_close(gradient.cpu(), right, rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", cpu.FORMS)
def test_every_form(on_triton: str, form: str, dtype: torch.dtype) -> None:
    """One chunk, chunks of 4 rows (which do not divide 13), and of one row."""
    for reduction, (rows, terms) in zip(
        REDUCTIONS, ((None, {}), (4, cpu.ALL_TERMS), (None, cpu.ALL_TERMS), (6, cpu.ALL_TERMS)), strict=True
    ):
        row = 37 * (2 if form.startswith("hidden") else 1) * dtype.itemsize
        check(cpu.make(form, dtype), on_triton, reduction, memory_budget=rows and rows * row, **terms)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name, form in itertools.product(cpu.OPTIONS, ("hidden", "topk"))
        if form == "hidden" or "divergence" not in cpu.OPTIONS[name]
    ],
)
def test_every_option(on_triton: str, name: str, form: str) -> None:
    inputs = cpu.make(form, bias=form == "hidden")
    if cpu.OPTIONS[name].get("ignore_index"):
        inputs = replace(inputs, labels=inputs.labels.masked_fill(inputs.labels == -100, 7))
    check(inputs, on_triton, memory_budget=37 * 4 * 2 * 5, **cpu.OPTIONS[name])


def test_without_a_teacher(on_triton: str) -> None:
    for options in ({"ce_weight": 1.0}, {"entropy_weight": 1.0}):
        check(cpu.make("none"), on_triton, kl_weight=0.0, **options)


def test_a_wide_vocabulary(on_triton: str) -> None:
    for form in ("hidden+bias", "topk"):
        inputs = cpu.make(form, leading=(3,), k=16, vocab=2100)
        check(inputs, on_triton, memory_budget=2 * 2100 * 4 * 2, **cpu.ALL_TERMS)


def test_leading_dimensions_and_strides(on_triton: str) -> None:
    inputs = cpu.make("hidden", leading=(3, 2, 2))
    other = replace(
        inputs,
        hidden=inputs.hidden.transpose(0, 2).contiguous().transpose(0, 2),
        weight=inputs.weight.t().contiguous().t(),
    )
    right = on_device(inputs, on_triton).loss(reduction="none", **cpu.ALL_TERMS)
    found = on_device(other, on_triton).loss(reduction="none", **cpu.ALL_TERMS)
    assert right.shape == (3, 2, 2)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    check(other, on_triton, memory_budget=37 * 4 * 2 * 5, **cpu.ALL_TERMS)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_and_none_that_count(on_triton: str, reduction: str) -> None:
    some = cpu.make("hidden")
    for inputs in (
        cpu.make("hidden", leading=(2, 0)),
        replace(some, labels=torch.full_like(some.labels, -100)),
    ):
        given = on_device(inputs.trained(), on_triton)
        loss = given.loss(reduction=reduction, **cpu.ALL_TERMS)
        if reduction == "none":
            assert loss.shape == inputs.labels.shape
        else:
            assert loss.item() == 0 if reduction == "sum" else math.isnan(loss.item())
        for gradient in torch.autograd.grad(loss.sum(), given.leaves()):
            assert not gradient.any()


def test_nan_in_a_row_is_a_nan_loss(on_triton: str) -> None:
    inputs = cpu.make("hidden").trained()
    with torch.no_grad():
        inputs.hidden[4, 2] = math.nan
    given = on_device(inputs, on_triton)
    losses = given.loss(reduction="none", memory_budget=37 * 8 * 3)
    assert losses.isnan().nonzero().tolist() == [[4]]
    hidden, weight, _ = torch.autograd.grad(given.loss(), given.leaves())
    assert hidden.isnan().any(-1).nonzero().tolist() == [[4]]
    assert weight.isnan().all()


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward(on_triton: str, dtype: torch.dtype, reduction: str) -> None:
    given = on_device(cpu.make("hidden", dtype).trained(), on_triton)
    loss = given.loss(reduction=reduction, memory_budget=37 * 4 * 2 * 4, **cpu.ALL_TERMS)
    factor = torch.full_like(loss, 0.7)
    first = torch.autograd.grad(loss, given.leaves(), factor, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, given.leaves(), factor * 2)
    for one, other, held in zip(first, second, kept, strict=True):
        assert_same_bits(one, held)
        cpu.assert_close(other, 2 * held.double(), 2 * cpu.TOLERANCE[dtype])


def test_opcheck(on_triton: str) -> None:
    given = on_device(cpu.make("topk").trained("hidden", "weight"), on_triton)
    args = cpu.schema_arguments(given, "batchmean", True, True, False, memory_budget=700)
    assert set(torch.library.opcheck(cpu.OP, args).values()) == {"SUCCESS"}


# ------------------------------------------------------------------------------------------- the k best


def run_topk(
    student: Tensor, topk: tuple[Tensor, Tensor], labels: Tensor, device: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernels as the op calls them, over the student's logits."""
    grad = student.to(device, copy=True)
    kept = tuple(x.to(device) for x in topk)
    o = vars(DistillOptions(**options))
    load = _triton.load("distill_loss").distill_loss
    loss = load(grad, None, labels.to(device), 0.5, 0.25, grad, topk=kept, **o)
    return loss.cpu(), grad.cpu()


@pytest.mark.parametrize("vocab", [29, 2500, 16500])
def test_topk_in_place(on_triton: str, vocab: int) -> None:
    """Against the page: an index that comes twice counts twice; a masked place, an ignored row."""
    inputs = distill_inputs(DistillCase(3, vocab, "top-k"))
    student = inputs.student.clone()
    student[1, 5] = -math.inf
    labels = torch.tensor([3, 7, -100])
    log_probs, indices = torch.log_softmax(inputs.teacher / 2, -1).topk(7, -1)
    indices = indices.clone()
    indices[0, 3] = indices[0, 0] = labels[0]
    indices[:, 6] = vocab - 1
    log_probs[1, 4] = -math.inf
    for options in (
        {"temperature": 2.0},
        {**cpu.ALL_TERMS, "softcap": 6.0, "student_scale": 1.5},
        {"ce_weight": 1.0, "kl_weight": 0.3, "student_scale": -0.5},
    ):
        if options.get("student_scale", 1.0) < 0:
            student[1, 5] = 0.5
        keep = (log_probs, indices if vocab % 2 else indices.int())
        loss, grad = run_topk(student, keep, labels, on_triton, **options)
        o = DistillOptions(**options)
        right, slope = page.row_losses(student, None, labels, o, topk=keep, term_scale=0.5, ce_scale=0.25)
        torch.testing.assert_close(loss, right, rtol=1e-6, atol=1e-7)
        bound = 1e-6 * slope.abs().amax(-1, keepdim=True) + 2e-7
        testing.assert_within(grad, slope, bound.expand_as(slope))


def test_more_than_a_step_of_indices(on_triton: str) -> None:
    """All of a vocabulary of 150 as the k best: forward KL."""
    inputs = distill_inputs(DistillCase(3, 150, "all"))
    order = torch.log_softmax(inputs.teacher / 3, -1).sort(-1, descending=True)
    loss, grad = run_topk(inputs.student, tuple(order), inputs.labels, on_triton, temperature=3.0)
    o = DistillOptions(temperature=3.0)
    right, slope = page.row_losses(inputs.student, inputs.teacher, inputs.labels, o, term_scale=0.5)
    torch.testing.assert_close(loss, right, rtol=2e-6, atol=0)
    testing.assert_within(grad, slope, (2e-6 * slope.abs().amax(-1, keepdim=True)).expand_as(slope))


def test_no_index_and_one_out_of_range(on_triton: str) -> None:
    """None: the divergence is 0. Out of range, which of a GPU's nobody waits to see: the row is NaN."""
    inputs = distill_inputs(DistillCase(3, 40, "few"), ignored=False)
    none = (torch.empty(3, 0), torch.empty(3, 0, dtype=torch.int64))
    loss, grad = run_topk(inputs.student, none, inputs.labels, on_triton)
    assert not loss.any()
    assert not grad.any()
    log_probs, indices = torch.log_softmax(inputs.teacher, -1).topk(4, -1)
    indices[1, 2] = 40
    loss, grad = run_topk(inputs.student, (log_probs, indices), inputs.labels, on_triton)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]
    given = replace(cpu.make("topk", leading=(3,), vocab=40), teacher={"teacher_topk": (log_probs, indices)})
    if on_triton == "cpu":
        with pytest.raises(ValueError, match=r"indices\[1, 2\] is 40, which is not in \[0, 40\)"):
            given.loss()
    else:
        assert on_device(given, on_triton).loss().isnan()


# ------------------------------------------------------------------------------------------- the GPU


def test_nothing_waits_for_the_gpu(on_triton: str) -> None:
    """Neither labels, nor indices, nor incoming gradients are looked at."""
    if on_triton != "cuda":
        pytest.skip("needs a CUDA GPU")
    for form, dtype, reduction in itertools.product(cpu.FORMS, DTYPES, REDUCTIONS):
        given = on_device(cpu.make(form, dtype).trained(), "cuda")

        def step() -> None:
            loss = given.loss(reduction=reduction, memory_budget=37 * 4 * 2 * 4, **cpu.ALL_TERMS)  # noqa: B023
            torch.autograd.grad(loss.sum() * 0.5, given.leaves())  # noqa: B023

        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_is_a_tenth_of_the_logits_form(on_triton: str) -> None:
    """Beyond the gradients, which both forms give."""
    if on_triton != "cuda":
        pytest.skip("needs a CUDA GPU")
    rows, k, vocab = 4096, 64, 32000
    given = on_device(cpu.make("hidden", torch.bfloat16, (rows,), k, vocab).trained(), "cuda")
    gradients = sum(x.nbytes for x in given.leaves())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    given.loss(**cpu.ALL_TERMS).backward()
    chunked = torch.cuda.max_memory_allocated() - before - gradients
    logits = 2 * rows * vocab * 2
    assert chunked <= 0.2 * logits + gradients + (32 << 20)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distill_loss_of_the_logits_is_the_same(on_triton: str, divergence: str) -> None:
    """The same products and the same kernel."""
    given = on_device(cpu.make("logits", leading=(9,)), on_triton)
    logits = torch.nn.functional.linear(given.hidden, given.weight, given.bias)
    options = {**cpu.ALL_TERMS, "divergence": divergence, "reduction": "none"}
    right = cpu.distill_loss(logits, given.teacher["teacher_logits"], given.labels, **options)
    torch.testing.assert_close(given.loss(**options), right, rtol=1e-6, atol=0)
