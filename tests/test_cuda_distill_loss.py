"""The CUDA kernels of ``distill_loss``, held to the CPU tests' float64 page, on a GPU or in the emulator.

The emulator's exp2 is off by as much as CUDA allows a GPU's to be.
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

from lissom import _cuda, registry, testing
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
)

pytestmark = pytest.mark.cuda

MOST_ROWS, MOST_COLUMNS = 12, 2100
"""In the emulator; a GPU takes every case."""

ROWS = 9
"""More than twice the emulator's multiprocessors: long rows are not split."""


@pytest.fixture(autouse=True)
def on_cuda(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every call is CUDA's; on a GPU ``solve`` moves its inputs there and its results back."""

    monkeypatch.setattr(cpu, "solve", shared.solve_on(cuda_device))
    with testing.use("cuda"):
        yield cuda_device


def run(
    inputs: DistillInputs, device: str, term_scale: Any = 1.0, ce_scale: Any = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernels as the op calls them: losses and gradient, on the device."""
    student = inputs.student.to(device)
    grad = torch.full_like(student, 7.0)
    backend = registry.select("distill_loss", device, "cuda").run
    teacher, labels = inputs.teacher.to(device), inputs.labels.to(device)
    loss = backend(student, teacher, labels, DistillOptions(**options), term_scale, ce_scale, grad)
    return loss, grad


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", DISTILL_CASES, ids=str)
def test_every_case(on_cuda: str, case: DistillCase) -> None:
    turns = [*itertools.product(DIVERGENCES, ({}, cpu.ALL_TERMS))]
    if on_cuda == "cpu":
        vocab = min(case.vocab, MOST_COLUMNS)
        case = DistillCase(min(case.rows, MOST_ROWS, max(1, MOST_COLUMNS // vocab)), vocab, case.why)
        turns = turns if vocab < 1000 else [turns[0], turns[3], turns[4]]
    for i, (divergence, terms) in enumerate(turns):
        dtype = DTYPES[(i // 2 if case.vocab < 10000 else 0) % 3]
        cpu.check_kind(cpu.made(case, dtype), {**terms, "divergence": divergence}, "normal", case)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", cpu.OPTIONS)
def test_every_option(name: str, divergence: str) -> None:
    options = {**cpu.OPTIONS[name], "divergence": divergence}
    dtype = DTYPES[list(cpu.OPTIONS).index(name) % 3]
    cpu.check(cpu.made(DistillCase(5, 75, "options"), dtype), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_a_row(dtype: torch.dtype) -> None:
    """Rows of several steps; bfloat16 and float16 ones that begin anywhere within 16 bytes."""
    for vocab in (2056, 1171):
        cpu.check(cpu.made(DistillCase(3, vocab, "blocks"), dtype), {"temperature": 1.7})
    for divergence, name in zip(DIVERGENCES, ("everything", "ce-hot", "softcap"), strict=True):
        options = {**cpu.OPTIONS[name], "divergence": divergence}
        cpu.check(cpu.made(DistillCase(2, 1171, "blocks"), dtype), options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_shared_memory_does_not_hold(divergence: str) -> None:
    """Their last groups are read again; with more threads than a row of these would be given, too."""
    for dtype, terms in ((torch.bfloat16, {}), (torch.float32, {"ce_weight": 0.5, "temperature": 2.0})):
        if terms or divergence == "forward":
            case = DistillCase(ROWS, 41003, "long")
            labels = torch.arange(ROWS) * 4000
            labels[2:] = -100
            inputs = cpu.made(case, dtype)
            cpu.check(
                DistillInputs(inputs.student, inputs.teacher, labels), {**terms, "divergence": divergence}
            )


@pytest.mark.parametrize(
    ("divergence", "terms"), [("forward", {}), ("js", {}), ("reverse", cpu.ALL_TERMS)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_on_16_bytes(
    on_cuda: str, dtype: torch.dtype, divergence: str, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough of them that none is split. On a Hopper GPU they are a cluster's each,
    of 1, 2 and 8 blocks."""
    options = {**terms, "temperature": 1.7, "divergence": divergence}
    for vocab in (8192, 32000, 128256, 262144) if on_cuda == "cuda" else (8200,):
        inputs = cpu.made(DistillCase(280 if on_cuda == "cuda" else ROWS, vocab, "long"), dtype)
        student, labels = inputs.student.clone(), inputs.labels.clone()
        student[2, vocab // 2] = math.nan  # that of the rows beside it stays
        labels[5] = vocab
        inputs = DistillInputs(student, inputs.teacher, labels)
        loss, grad = (x.cpu() for x in run(inputs, on_cuda, **options))
        nan = torch.zeros(len(labels), dtype=torch.bool)
        nan[[2, 5]] = True
        assert loss.isnan().tolist() == nan.tolist()
        assert grad.isnan().all(1).tolist() == nan.tolist()
        some = torch.tensor([0, 1, 3, 4, 6, len(labels) - 1])
        results = loss[some].float(), grad[some]
        monkeypatch.setattr(cpu, "solve", lambda *_, results=results, **__: results)
        cpu.check(DistillInputs(student[some], inputs.teacher[some], labels[some]), options)
        backend = registry.select("distill_loss", on_cuda, "cuda").run
        overwritten, teacher = student.to(on_cuda, copy=True), inputs.teacher.to(on_cuda)
        args = (labels.to(on_cuda), DistillOptions(**options), 1.0, 1.0, overwritten)
        assert_same_bits(backend(overwritten, teacher, *args).cpu(), loss)
        assert_same_bits(overwritten.cpu(), grad)


@pytest.mark.parametrize(
    ("divergence", "terms"),
    [("forward", {}), ("forward", cpu.ALL_TERMS), ("reverse", {}), ("js", {})],
    ids=str,
)
def test_long_rows_are_split(divergence: str, terms: dict[str, Any]) -> None:
    """Rows of which there are fewer than multiprocessors: a block per part, a launch per pass."""
    inputs = cpu.made(DistillCase(2, 16411, "split"))
    options = {**terms, "divergence": divergence}
    cpu.check(DistillInputs(inputs.student, inputs.teacher, torch.tensor([-100, 5])), options)
    if terms:
        cpu.check(inputs, {**options, "label_smoothing": 0.1})


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", DISTILL_KINDS)
def test_every_kind_of_logits(kind: str, divergence: str) -> None:
    if kind == "masked_teacher" and divergence == "reverse":
        kind = "masked_both"  # the other is infinite
    for terms, vocab, dtype in (
        ({}, 77, torch.float32),
        ({}, 7, torch.float32),
        (cpu.ALL_TERMS, 60, torch.float32),
        ({"temperature": 4.0, "ce_weight": 1.0}, 40, DTYPES[1 + DIVERGENCES.index(divergence) % 2]),
    ):
        case = DistillCase(5, vocab, "kinds")
        cpu.check_kind(cpu.made(case, dtype, kind=kind), {**terms, "divergence": divergence}, kind, case)


@pytest.mark.parametrize("kind", ["close", "equal", "peaked", "extreme"])
def test_long_rows_that_nearly_agree(kind: str) -> None:
    for dtype, temperature in itertools.product(DTYPES, (1.0, 3.0)):
        case = DistillCase(2, 1500, "kinds")
        cpu.check_kind(cpu.made(case, dtype, kind=kind), {"temperature": temperature}, kind, case)


test_randomized = shared.test_randomized


test_reductions = shared.test_reductions


test_nothing_counts = shared.test_nothing_counts


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(divergence: str, where: str) -> None:
    for bad, terms, vocab in ((math.nan, {}, 1200), (math.inf, cpu.ALL_TERMS, 70), (math.inf, {}, 70)):
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
    cpu.test_rows_masked_all_over_are_nan("cuda", divergence, where)


def test_nan_in_ce_and_entropy_alone() -> None:
    cpu.test_nan_in_ce_and_entropy_alone("cuda")


def test_infinite_divergence() -> None:
    cpu.test_infinite_divergence("cuda")


test_one_side_masks_and_the_other_gives_nothing = shared.test_one_side_masks_and_the_other_gives_nothing


def test_label_that_is_masked() -> None:
    cpu.test_label_that_is_masked("cuda")


test_masked_logits_without_a_teacher = shared.test_masked_logits_without_a_teacher


def test_labels_out_of_range(on_cuda: str) -> None:
    """Raised for where labels are on the CPU; on a GPU, where nobody waits to see them, NaN rows."""
    inputs = cpu.made(DistillCase(5, 30, "labels"), ignored=False)
    labels = inputs.labels.clone()
    labels[1], labels[3] = 30, -1
    for options in ({}, {"ce_weight": 1.0}, {"ce_weight": 1.0, "divergence": "js"}):
        loss, grad = run(DistillInputs(inputs.student, inputs.teacher, labels), on_cuda, **options)
        assert loss.isnan().tolist() == [False, True, False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False, True, False]
        assert grad[[0, 2, 4]].isfinite().all()
    student, teacher = inputs.student.to(on_cuda), inputs.teacher.to(on_cuda)
    if on_cuda == "cpu":
        with pytest.raises(ValueError, match=r"labels\[1\] is 30, which is not in \[0, 30\)"):
            distill_loss(student, teacher, labels)
    else:
        assert distill_loss(student, teacher, labels.to(on_cuda)).isnan()


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_ignored_rows_count_in_no_term(ignore_index: int) -> None:
    """Rows that all begin on 16 bytes: bits depend on that, and on nothing else of where a row lies."""
    inputs = cpu.made(DistillCase(9, 24, "ignored"), ignored=False)
    labels = inputs.labels.where(inputs.labels != ignore_index, 1).int()
    left, others = torch.tensor([0, 1, 3, 4, 7]), torch.tensor([2, 5, 6, 8])
    labels[others] = ignore_index
    student, teacher = inputs.student.clone(), inputs.teacher.clone()
    student[5], teacher[6], student[8, 3], teacher[8, 4] = math.nan, math.nan, math.inf, -math.inf
    fewer = DistillInputs(student[left], teacher[left], labels[left])
    for reduction, terms in itertools.product(cpu.REDUCTIONS, (cpu.ALL_TERMS, {})):
        options = {**terms, "ignore_index": ignore_index}
        loss, grad = cpu.solve(DistillInputs(student, teacher, labels), reduction, **options)
        fewer_loss, fewer_grad = cpu.solve(fewer, reduction, **options)
        if reduction == "none":
            assert not loss[others].any()
            loss = loss[left]
        torch.testing.assert_close(loss, fewer_loss, rtol=2e-7, atol=0)
        assert_same_bits(grad[left], fewer_grad)
        assert_same_bits(grad[others].abs(), torch.zeros(4, 24))


def test_ignored_rows_are_not_read() -> None:
    inputs = cpu.made(DistillCase(3, 1300, "ignored"))
    student = inputs.student.clone()
    student[1] = math.nan
    labels = torch.tensor([7, -100, 8])
    for divergence in DIVERGENCES:
        loss, grad = cpu.solve(DistillInputs(student, inputs.teacher, labels), divergence=divergence)
        assert loss[1] == 0
        assert not grad[1].any()
        assert loss[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", VIEWS)
def test_strides(on_cuda: str, name: str) -> None:
    for dtype, terms in itertools.product(DTYPES, ({}, cpu.ALL_TERMS)):
        inputs = cpu.made(DistillCase(20, 34, "strides"), dtype)
        student, teacher = (VIEWS[name](x).to(on_cuda) for x in (inputs.student, inputs.teacher))
        labels = inputs.labels.to(on_cuda)
        if student.dim() == 3:
            labels = labels.view(4, 5)
            if name == "middle_of_three_dimensions":
                labels = labels.t()
        leaf = student.detach().requires_grad_()
        loss = distill_loss(leaf, teacher, labels, reduction="none", **terms)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss.shape == student.shape[:-1]
        flat = [x.detach().cpu().reshape(20, 34) for x in (student, teacher)]
        same = DistillInputs(*flat, labels=labels.cpu().reshape(20))
        wanted, wanted_grad = cpu.solve(same, **terms)
        torch.testing.assert_close(loss.detach().cpu().reshape(20), wanted, rtol=5e-7, atol=1e-7)
        torch.testing.assert_close(
            grad.cpu().reshape(20, 34), wanted_grad, rtol=2 * UNIT_ROUNDOFF[dtype], atol=5e-7
        )


def test_every_beginning_within_16_bytes() -> None:
    """Rows that begin alike in all tensors are read 16 bytes at a time, others an element at a time."""
    for dtype, vocab in itertools.product(DTYPES, (31, 64)):
        inputs = cpu.made(DistillCase(3, vocab, "beginnings"), dtype)
        for student_at, teacher_at in ((0, 0), (1, 1), (3, 3), (2, 5), (0, 8)):
            both = []
            for inner, at in ((inputs.student, student_at), (inputs.teacher, teacher_at)):
                outer = torch.full((5, vocab + 17), math.nan, dtype=dtype)
                outer[1:4, at : at + vocab] = inner
                both.append(outer[1:4, at : at + vocab])
            for terms in ({}, {"ce_weight": 0.5}):
                cpu.check(DistillInputs(both[0], both[1], inputs.labels), terms)


def test_leading_dimensions() -> None:
    for shape in ((9,), (2, 3, 9), (2, 1, 4, 9)):
        cpu.test_leading_dimensions("cuda", shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_may_differ(dtype: torch.dtype) -> None:
    for teacher_dtype, divergence in zip(DTYPES, DIVERGENCES, strict=True):
        for vocab in (70, 64):
            inputs = cpu.made(DistillCase(5, vocab, "dtypes"), dtype, teacher_dtype)
            cpu.check(inputs, {**cpu.ALL_TERMS, "divergence": divergence})
    cpu.check(cpu.made(DistillCase(5, 70, "dtypes"), dtype, torch.bfloat16), {})


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_may_overwrite_the_logits(on_cuda: str, divergence: str) -> None:
    backend = registry.select("distill_loss", on_cuda, "cuda").run
    for dtype, vocab in ((torch.float16, 33), (torch.bfloat16, 1200), (torch.float32, 16400)):
        inputs = cpu.made(DistillCase(2, vocab, "in place"), dtype)
        teacher, labels = inputs.teacher.to(on_cuda), inputs.labels.to(on_cuda)
        for terms in ({}, cpu.ALL_TERMS) if vocab < 2000 else ({"ce_weight": 0.5},):
            args = (teacher, labels, DistillOptions(**terms, divergence=divergence), 0.5, 0.25)
            student = inputs.student.to(on_cuda, copy=True)
            grad = torch.empty_like(student)
            loss = backend(student, *args, grad)
            assert_same_bits(student.cpu(), inputs.student)
            assert_same_bits(backend(student, *args, student), loss)
            assert_same_bits(student, grad)


def test_the_loss_alone_has_the_same_bits(on_cuda: str) -> None:
    for divergence, vocab in itertools.product(DIVERGENCES, (50, 1300)):
        inputs = cpu.made(DistillCase(3, vocab, "alone"), ignored=False)
        options = {"divergence": divergence, "reduction": "none"}
        student, teacher = inputs.student.to(on_cuda), inputs.teacher.to(on_cuda)
        loss = distill_loss(student, teacher, **options)
        assert_same_bits(loss.cpu(), cpu.solve(inputs, **options)[0])


# ------------------------------------------------------------------------------------------- clusters


@pytest.fixture
def hopper(on_cuda: str) -> Iterator[str]:
    """Hopper's forms are chosen."""
    module = _cuda.load()
    if on_cuda == "cuda":
        if not module.hopper_forms():
            pytest.skip("cuda: clusters need a Hopper GPU, and LISSOM_CUDA_HOPPER not 0")
        yield on_cuda
        return
    module.device(90, 4)
    yield on_cuda
    module.device(80, 4)


CLUSTER_FORMS = (
    ("forward", {}),
    ("forward", cpu.OPTIONS["everything"]),
    ("reverse", {"entropy_weight": 0.3}),
    ("js", {}),
    ("js", {**cpu.ALL_TERMS, "label_smoothing": 0.1}),
    ("forward", cpu.OPTIONS["no-kl"]),
)


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("which", range(len(CLUSTER_FORMS)))
def test_a_cluster_a_row(hopper: str, which: int, turn: int) -> None:
    """1, 2, 4 and 8 blocks a row; ignored rows among them; teachers of another type."""
    divergence, terms = CLUSTER_FORMS[which]
    vocab = (8192, 10008, 20000, 32000, 65536)[(which + 3 * turn) % 5]
    dtype, other = (DTYPES[(vocab + which + i) % 3] for i in range(2))
    rows = 160 if hopper == "cuda" else 4
    inputs = cpu.made(DistillCase(rows, vocab, "clusters"), dtype, other if terms else dtype)
    cpu.check(inputs, {**terms, "divergence": divergence})
    if not terms:
        student, teacher = (x.to(hopper) for x in (inputs.student, inputs.teacher))
        loss = distill_loss(student, teacher, divergence=divergence, reduction="none")
        good = inputs.labels != -100
        assert_same_bits(loss.cpu()[good], cpu.solve(inputs, divergence=divergence)[0][good])


def test_clusters_are_chosen(hopper: str) -> None:
    on = torch.zeros(1, device=hopper)

    def plan(rows: int, vocab: int, **changed: Any) -> tuple[int, int]:
        strides = dict.fromkeys(("student_stride", "teacher_stride", "grad_stride"), vocab)
        found: tuple[int, int] = _cuda.call(
            "distill_plan", on, arguments(rows=rows, vocab=vocab, **{**strides, **changed})
        )
        return found

    cluster = [plan(10000, vocab) for vocab in (8192, 16384, 32768, 65536)]
    assert cluster == [(size, 0) for size in (1, 2, 4, 8)]
    assert plan(10000, 8184) == (1, 0)  # short
    assert plan(10000, 65537) == (1, 0)  # not on 16 bytes
    assert plan(10000, 65536, grad=8) == (1, 0)
    assert plan(1, 65536)[1] > 0 or hopper == "cpu"  # few: split


@pytest.mark.parametrize("kind", ["close", "masked_both"])
def test_kinds_of_logits_in_clusters(hopper: str, kind: str) -> None:
    rows = 160 if hopper == "cuda" else 4
    for divergence, dtype, vocab in zip(DIVERGENCES, DTYPES, (8192, 16384, 20000), strict=True):
        case = DistillCase(rows, vocab, "clusters")
        cpu.check_kind(cpu.made(case, dtype, kind=kind), {"divergence": divergence}, kind, case)


def test_nan_stays_in_its_cluster(hopper: str) -> None:
    rows = 160 if hopper == "cuda" else 4
    inputs = cpu.made(DistillCase(rows, 20000, "NaN"), torch.bfloat16, ignored=False)
    for divergence in DIVERGENCES:
        clean, clean_grad = run(inputs, hopper, divergence=divergence)
        student = inputs.student.clone()
        student[1, 19999] = math.nan
        loss, grad = run(DistillInputs(student, inputs.teacher, inputs.labels), hopper, divergence=divergence)
        assert loss[1].isnan()
        assert grad[1].isnan().all()
        assert_same_bits(loss[2:], clean[2:])
        assert_same_bits(grad[2:], clean_grad[2:])


# ------------------------------------------------------------------------------------------- factors, sizes


def test_factors_on_the_device(on_cuda: str) -> None:
    """Of a GPU's labels nobody knows how many count: the kernels read the reduction's factors there."""
    for divergence, terms in itertools.product(DIVERGENCES, ({}, {**cpu.ALL_TERMS, "softcap": 9.0})):
        inputs = cpu.made(DistillCase(5, 60, "factors"), torch.bfloat16)
        options = {**terms, "divergence": divergence}
        scales = [torch.tensor(x, dtype=torch.float64, device=on_cuda) for x in (0.125, 0.5)]
        loss, grad = run(inputs, on_cuda, *scales, **options)
        same_loss, same_grad = run(inputs, on_cuda, 0.125, 0.5, **options)
        torch.testing.assert_close(loss, same_loss, rtol=1e-12, atol=0)
        assert_same_bits(grad, same_grad)


def test_gradients_per_row() -> None:
    cpu.test_gradients_per_row("cuda")


def arguments(**changed: Any) -> Any:
    module = _cuda.load()
    logits = module.DistillLogits(0, 0, changed.pop("student_stride", 20), 1.0)
    teacher = module.DistillLogits(0, 0, changed.pop("teacher_stride", 20), 1.0)
    sizes = {"rows": 3, "vocab": 20, "grad": 16, "grad_stride": 20, **changed}
    weights = dict.fromkeys(("temperature", "kl_weight", "term_scale", "ce_scale"), 1.0)
    nothing = dict.fromkeys(("ce_weight", "entropy_weight", "js_beta", "label_smoothing", "softcap"), 0.0)
    absent = dict.fromkeys(("labels", "scales"), 0)
    return module.DistillLoss(
        student=logits,
        teacher=teacher,
        wide_labels=True,
        ignore_index=-100,
        divergence=1,
        **{**weights, **nothing, **absent, **sizes},
    )


def test_bad_sizes(on_cuda: str) -> None:
    on = torch.zeros(1, device=on_cuda)
    for changed, message in (
        ({"student_stride": 19}, "student_stride=19 is less than a row of 20"),
        ({"teacher_stride": 2}, "teacher_stride=2 is less than a row of 20"),
        ({"grad_stride": 7}, "grad_stride=7 is less than a row of 20"),
        ({"vocab": 0}, r"logits of shape \[3, 0\]"),
        ({"rows": -1}, r"logits of shape \[-1, 20\]"),
        ({"rows": 1, "vocab": 2**31}, "a vocabulary of 2147483648 is larger than 2147483584"),
    ):
        with pytest.raises(ValueError, match=f"distill_loss: {message}"):
            _cuda.call("distill_plan", on, arguments(**changed))
    with pytest.raises(ValueError, match=r"distill_loss: \d+ blocks are more than a launch can have"):
        _cuda.call("distill_loss", on, arguments(rows=2**40), 0, 0)


def test_parts_of_rows(on_cuda: str) -> None:
    """Many rows are not split, few long ones are; and huge ones, so that float32 sums stay short."""
    on = torch.zeros(1, device=on_cuda)

    def parts(rows: int, vocab: int) -> int:
        strides = dict.fromkeys(("student_stride", "teacher_stride", "grad_stride"), vocab)
        return int(_cuda.call("distill_plan", on, arguments(rows=rows, vocab=vocab, **strides))[0])

    assert parts(10000, 128256) == (8 if _cuda.load().hopper_forms() else 1)  # blocks of a cluster
    assert parts(1, 2000) == 1
    assert 1 < parts(1, 128256) <= 32
    assert parts(10000, 2**24) > 1


@pytest.mark.parametrize("groups", [1, 7, 1024, 4000, 16032])
def test_slices_of_clusters(on_cuda: str, groups: int) -> None:
    """Blocks of a cluster share out a row, chunks a slice: every byte of both logits once."""
    if on_cuda == "cuda":
        pytest.skip("arithmetic of the host")
    slice_of = _cuda.load().selftest_slice
    for cluster, sizes, chunk_groups in itertools.product(
        (1, 2, 4, 8), ((16, 16), (32, 16), (16, 32), (16, 0)), (64, 576)
    ):
        slices = [slice_of(rank, cluster, groups, *sizes, chunk_groups) for rank in range(cluster)]
        assert [begin for begin, *_ in slices] == [0, *(end for _, end, *_ in slices[:-1])]
        assert slices[-1][1] == groups
        for begin, end, size, chunks in slices:
            assert size == sum(sizes) * (end - begin)
            assert size <= sum(sizes) * -(-groups // cluster)
            assert all(0 < count <= chunk_groups for count, *_ in chunks)
            taken = [
                (at + i * each, each)
                for count, *both in chunks
                for at, each in zip(both, sizes, strict=True)
                for i in range(count if each else 0)
            ]
            assert all(at % 16 == 0 for at, _ in taken)
            assert sorted(itertools.chain(*(range(at, at + each, 16) for at, each in taken))) == list(
                range(0, size, 16)
            )


# ------------------------------------------------------------------------------------------- the operator


def test_opcheck(on_cuda: str) -> None:
    inputs = cpu.made(DistillCase(5, 20, "opcheck"))
    student = inputs.student.to(on_cuda, copy=True).requires_grad_()
    teacher, labels = inputs.teacher.to(on_cuda), inputs.labels.to(on_cuda)
    options = (2.0, 1.0, 0.5, 0.1, "js", 0.3, -100, 0.1, None, 1.0, 1.0, "batchmean")
    op = torch.ops.lissom.distill_loss.default
    result = torch.library.opcheck(op, (student, teacher, labels, *options, True, "cuda"))
    assert set(result.values()) == {"SUCCESS"}


def test_nothing_waits_for_the_gpu(on_cuda: str) -> None:
    """Neither labels nor incoming gradients are looked at; and so a CUDA graph can be captured."""
    if on_cuda != "cuda":
        pytest.skip("needs a CUDA GPU")
    for dtype, reduction in itertools.product(DTYPES, cpu.REDUCTIONS):
        inputs = cpu.made(DistillCase(6, 3000, "sync"), dtype)
        student = inputs.student.cuda().requires_grad_()
        teacher, labels = inputs.teacher.cuda(), inputs.labels.cuda()

        def step() -> Tensor:
            loss = distill_loss(student, teacher, labels, reduction=reduction)  # noqa: B023 -- called in the same round
            (grad,) = torch.autograd.grad(loss.sum() * 0.5, student)  # noqa: B023 -- called in the same round
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
