"""The modules of distillation losses: what reaches the ops, masks, shifted labels, layers, projections."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lissom
from lissom.nn import DistillationLoss, HiddenStateLoss, LinearDistillationLoss
from lissom.ops import distill_loss, linear_distill_loss
from lissom.testing import assert_same_bits

OPTIONS: dict[str, Any] = {
    "temperature": 3.0,
    "kl_weight": 0.7,
    "ce_weight": 0.5,
    "entropy_weight": 0.1,
    "divergence": "js",
    "js_beta": 0.2,
    "label_smoothing": 0.1,
    "softcap": 20.0,
    "student_scale": 1.1,
    "teacher_scale": 0.9,
    "reduction": "mean",
}


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(11, (2, 6))
    labels[1, 2] = -100
    return torch.randn(2, 6, 11), torch.randn(2, 6, 11), labels


# ------------------------------------------------------------------------------------------- logits


def test_every_option_reaches_the_op(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    assert_same_bits(DistillationLoss(**OPTIONS)(*logits), distill_loss(*logits, **OPTIONS))
    student, teacher, labels = logits
    labels = labels.masked_fill(labels == -100, 3)
    own = {**OPTIONS, "ignore_index": 3}
    assert_same_bits(
        DistillationLoss(**own)(student, teacher, labels), distill_loss(student, teacher, labels, **own)
    )


def test_outputs_of_models_have_logits(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = logits
    outputs = [SimpleNamespace(logits=x) for x in (student, teacher)]
    assert_same_bits(DistillationLoss()(*outputs), distill_loss(student, teacher))
    with pytest.raises(TypeError, match="student is tuple; give logits, or a model's output"):
        DistillationLoss()((student,), teacher)


def test_shifted_labels_are_the_next_tokens(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    """As Hugging Face's causal models take them: the last row of a sequence has no next token."""
    student, teacher, labels = logits
    loss = DistillationLoss(ce_weight=1.0, shift_labels=True)(student, teacher, labels)
    right = distill_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], ce_weight=1.0)
    torch.testing.assert_close(loss, right)
    ce = DistillationLoss(kl_weight=0.0, ce_weight=1.0, shift_labels=True)(student, labels=labels)
    torch.testing.assert_close(ce, F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_masked_rows_do_not_count(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = logits
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    kept = mask.bool()
    loss = DistillationLoss(temperature=2.0)
    right = distill_loss(student[kept], teacher[kept], temperature=2.0)
    torch.testing.assert_close(loss(student, teacher, attention_mask=mask), right)
    torch.testing.assert_close(loss(student, teacher, attention_mask=kept), right)
    both = DistillationLoss(ce_weight=1.0)(student, teacher, labels, mask)
    torch.testing.assert_close(both, distill_loss(student[kept], teacher[kept], labels[kept], ce_weight=1.0))
    shifted = DistillationLoss(shift_labels=True)(student, teacher, attention_mask=mask)
    before = F.pad(kept[:, 1:], (0, 1))
    torch.testing.assert_close(shifted, distill_loss(student[before], teacher[before]))


def test_it_trains(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = logits
    student.requires_grad_()
    loss = DistillationLoss(**{**OPTIONS, "reduction": "batchmean"})
    first = loss(student, teacher, labels)
    first.backward()
    assert student.grad is not None
    with torch.no_grad():
        assert loss(student - 0.1 * student.grad, teacher, labels) < first


@pytest.mark.parametrize("cls", [DistillationLoss, LinearDistillationLoss])
def test_options_are_checked_and_shown(cls: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}: temperature=0\.0 must be positive"):
        cls(temperature=0.0)
    with pytest.raises(ValueError, match=rf"{cls.__name__}: divergence='kl' is unknown"):
        cls(divergence="kl")
    with pytest.raises(TypeError, match="temprature"):
        cls(temprature=2.0)
    assert repr(cls()) == f"{cls.__name__}(temperature=1.0)"
    shown = repr(cls(temperature=4.0, ce_weight=0.5, shift_labels=True))
    assert shown == f"{cls.__name__}(temperature=4.0, ce_weight=0.5, shift_labels=True)"
    assert not list(cls().state_dict())
    assert repr(copy.deepcopy(cls(**OPTIONS))) == repr(cls(**OPTIONS))


def test_shapes_of_labels_and_masks(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = logits
    with pytest.raises(ValueError, match=r"labels has shape \(2, 5\); it must be \(2, 6\)"):
        DistillationLoss()(student, teacher, labels[:, 1:])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2,\); it must be \(2, 6\)"):
        DistillationLoss()(student, teacher, attention_mask=torch.ones(2))
    with pytest.raises(ValueError, match=r"labels is None but ce_weight=1\.0"):
        DistillationLoss(ce_weight=1.0)(student, teacher, attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"shift_labels needs rows in sequences"):
        DistillationLoss(shift_labels=True)(student[0, 0], teacher[0, 0], labels[0, 0])


# ------------------------------------------------------------------------------------------- hidden states


def test_linear_takes_heads_as_modules_or_weights() -> None:
    hidden, others = torch.randn(2, 6, 8), torch.randn(2, 6, 12)
    head, other_head = nn.Linear(8, 11), nn.Linear(12, 11, bias=False)
    labels = torch.randint(11, (2, 6))
    loss = LinearDistillationLoss(**OPTIONS, memory_budget=400)
    how: dict[str, Any] = {"labels": labels, "memory_budget": 400, **OPTIONS}
    right = linear_distill_loss(
        hidden, head.weight, head.bias, teacher_hidden=others, teacher_weight=other_head.weight, **how
    )
    assert_same_bits(loss(hidden, head, others, other_head, labels).detach(), right.detach())
    assert_same_bits(loss(hidden, head, others, other_head.weight, labels).detach(), right.detach())
    tied = nn.Embedding(11, 8)
    right = linear_distill_loss(
        hidden, tied.weight, teacher_hidden=others, teacher_weight=other_head.weight, **how
    )
    assert_same_bits(loss(hidden, tied, others, other_head, labels).detach(), right.detach())
    with pytest.raises(TypeError, match="student_head is ReLU; give the output layer"):
        loss(hidden, nn.ReLU(), others, other_head)
    assert "memory_budget=400" in repr(loss)
    with pytest.raises(ValueError, match="memory_budget=-1 must be positive"):
        LinearDistillationLoss(memory_budget=-1)


def test_linear_is_the_loss_of_logits_in_every_form() -> None:
    hidden, others = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 12)
    head, other_head = nn.Linear(8, 11), nn.Linear(12, 11)
    labels, mask = torch.randint(11, (2, 6)), torch.ones(2, 6)
    mask[0, 4:] = 0
    how: dict[str, Any] = {"ce_weight": 1.0, "shift_labels": True}
    right = DistillationLoss(**how)(head(hidden), other_head(others), labels, mask)
    loss = LinearDistillationLoss(**how)
    topk = F.log_softmax(other_head(others), -1).topk(11, -1)
    for given in (
        {"teacher_hidden": others, "teacher_head": other_head},
        {"teacher_logits": other_head(others)},
        {"teacher_topk": (topk.values, topk.indices)},
    ):
        found = loss(hidden, head, labels=labels, attention_mask=mask, **given)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    found.backward()
    assert other_head.weight.grad is None
    assert head.weight.grad is not None
    assert hidden.grad is not None
    assert not hidden.grad[0, 4:].any()


def test_a_compressed_teacher_head() -> None:
    """Its dense weight is read, as any module's."""
    other_head = nn.Linear(16, 11)
    small = lissom.nn.Int8Linear.from_linear(other_head)
    hidden, others, head = torch.randn(5, 8), torch.randn(5, 16), nn.Linear(8, 11)
    loss = LinearDistillationLoss()
    torch.testing.assert_close(
        loss(hidden, head, others, small), loss(hidden, head, others, other_head), rtol=0.02, atol=0.02
    )


DDP = """
import tempfile
import torch
import torch.distributed as dist
from torch import nn
from lissom.nn import LinearDistillationLoss

class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 11)
        self.loss = LinearDistillationLoss(memory_budget=300)

    def forward(self, x, teacher):
        return self.loss(self.body(x), self.head, teacher_logits=teacher)

dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
torch.manual_seed(0)
model = Student()
x, teacher = torch.randn(9, 6), torch.randn(9, 11)
model(x, teacher).backward()
alone = [p.grad.clone() for p in model.parameters()]
parallel = nn.parallel.DistributedDataParallel(model)
for _ in range(2):
    model.zero_grad()
    parallel(x, teacher).backward()
print(all(torch.equal(p.grad, a) for p, a in zip(model.parameters(), alone)))
dist.destroy_process_group()
"""


def test_distributed_data_parallel(run_python: Any) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    done = run_python(DDP)
    assert done.stdout.strip() == "True", done.stderr


# ------------------------------------------------------------------------------------------- layers


def test_mse_and_cosine_of_mapped_layers() -> None:
    own, others = list(torch.randn(3, 2, 5, 8)), list(torch.randn(7, 2, 5, 8))
    for name, formula in (
        ("mse", F.mse_loss),
        ("cosine", lambda h, g: (1 - F.cosine_similarity(h, g, dim=-1)).mean()),
    ):
        loss = HiddenStateLoss({0: 0, 1: 3, -1: -1}, 8, 8, loss=name)
        assert not list(loss.parameters())
        right = (formula(own[0], others[0]) + formula(own[1], others[3]) + formula(own[2], others[6])) / 3
        torch.testing.assert_close(loss(own, others), right)
        outputs = [SimpleNamespace(hidden_states=tuple(x)) for x in (own, others)]
        torch.testing.assert_close(loss(*outputs), right)


def test_projections_are_learned_where_widths_differ() -> None:
    loss = HiddenStateLoss({0: 0, 1: 2}, 6, 8)
    assert [tuple(p.weight.shape) for p in loss.projections] == [(8, 6), (8, 6)]
    assert set(loss.state_dict()) == {
        f"projections.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    own = list(torch.randn(2, 4, 6).requires_grad_())
    others = list(torch.randn(3, 4, 8).requires_grad_())
    first = loss(own, others)
    right = (
        F.mse_loss(loss.projections[0](own[0]), others[0])
        + F.mse_loss(loss.projections[1](own[1]), others[2])
    ) / 2
    torch.testing.assert_close(first, right)
    gradients = torch.autograd.grad(first, [*loss.parameters(), *own, *others], allow_unused=True)
    assert [g is not None for g in gradients] == [True] * 6 + [False] * 3
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        loss(own, others).backward()
        optimizer.step()
    assert loss(own, others) < first
    assert len(list(HiddenStateLoss({0: 0}, 8, 8, project=True, bias=False).parameters())) == 1


@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_padding_does_not_matter(name: str) -> None:
    """Not even NaN in it, to the loss or to a gradient."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.bool()
    loss = HiddenStateLoss({0: 0}, 6, 8, loss=name)
    h, g = torch.randn(2, 3, 6), torch.randn(2, 3, 8)
    right = loss([h[kept]], [g[kept]])
    h[~kept], g[~kept] = math.nan, math.inf
    h.requires_grad_()
    found = loss([h], [g], mask)
    torch.testing.assert_close(found, right)
    found.backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()
    assert not h.grad[~kept].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    assert math.isnan(loss([h], [g], torch.zeros(2, 3)).item())


def test_low_precision_is_compared_in_float32() -> None:
    loss = HiddenStateLoss({0: 0}, 8, 8)
    h, g = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    torch.testing.assert_close(loss([h], [g]), F.mse_loss(h.float(), g.float()), rtol=1e-6, atol=0)


def test_evenly_spaced_layers() -> None:
    assert HiddenStateLoss.every_so_many(3, 12) == {0: 0, 1: 4, 2: 8, 3: 12}
    assert HiddenStateLoss.every_so_many(4, 6) == {0: 0, 1: 1, 2: 3, 3: 4, 4: 6}
    with pytest.raises(ValueError, match="0 and 12 layers"):
        HiddenStateLoss.every_so_many(0, 12)


def test_bad_hidden_states() -> None:
    own, others = list(torch.randn(2, 4, 6)), list(torch.randn(3, 4, 8))
    loss = HiddenStateLoss({1: 2}, 6, 8)
    for call, error, text in (
        (lambda: HiddenStateLoss({}, 6, 8), ValueError, "layer_map is empty"),
        (lambda: HiddenStateLoss({0: 0}, 6, 8, loss="l1"), ValueError, "loss='l1' is unknown"),
        (
            lambda: HiddenStateLoss({0: 0}, 6, 8, project=False),
            ValueError,
            "project=False but student_dim=6 is not teacher_dim=8",
        ),
        (lambda: loss(own[:1], others), ValueError, "names layer 1 of the student, which has 1 hidden"),
        (lambda: loss(others, others), ValueError, "student's layer 1 has width 8, not student_dim=6"),
        (
            lambda: loss([x[:2] for x in own], others),
            ValueError,
            r"student's layer 1 has shape \(2, 6\) but the teacher's layer 2 \(4, 8\)",
        ),
        (lambda: loss(own, others, torch.ones(3)), ValueError, r"attention_mask has shape \(3,\)"),
        (lambda: loss(own, SimpleNamespace(hidden_states=None)), TypeError, "output_hidden_states=True"),
    ):
        with pytest.raises(error, match=text):
            call()
    assert repr(loss).startswith("HiddenStateLoss(\n  layer_map={1: 2}, 6, 8, loss='mse'")


def test_modules_compile_in_one_graph(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = logits
    layers = HiddenStateLoss({0: 1}, 11, 11, loss="cosine")
    both = DistillationLoss(ce_weight=1.0, shift_labels=True)

    def total(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return both(student, teacher, labels) + layers([student], [teacher, teacher])

    torch._dynamo.reset()
    found = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        value = function(leaf, teacher, labels)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0])
