"""Distillation in Hugging Face's Trainer, with tiny random models and no downloads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from lissom.integrations.transformers import distillation_compute_loss
from lissom.nn import DistillationLoss

OPTIONS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5, "kl_weight": 0.7}
VOCAB, LENGTH = 40, 9


def bert(kind: str, width: int) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=width,
        max_position_embeddings=16,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = getattr(transformers, kind)(config)
    return model


def gpt2(width: int) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=width,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama(width: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def t5(width: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "classifier": lambda width: bert("BertForSequenceClassification", width),
    "tagger": lambda width: bert("BertForTokenClassification", width),
    "masked": lambda width: bert("BertForMaskedLM", width),
    "causal": llama,
    "gpt2": gpt2,
    "encoder-decoder": t5,
}


def batch(kind: str, rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    if kind == "classifier":
        labels = torch.randint(5, (rows,), generator=generator)
    elif kind == "tagger":
        labels = torch.randint(5, (rows, LENGTH), generator=generator).masked_fill(mask == 0, -100)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def expected(kind: str, student: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    given = dict(inputs) if kind == "encoder-decoder" else {k: v for k, v in inputs.items() if k != "labels"}
    loss = DistillationLoss(**OPTIONS, shift_labels=kind in ("causal", "gpt2"))
    value: Tensor = loss(student(**given), teacher(**given), inputs["labels"])
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_both_models_logits(kind: str) -> None:
    student, teacher = KINDS[kind](16), KINDS[kind](32).train()
    inputs = batch(kind)
    compute_loss = distillation_compute_loss(teacher, **OPTIONS)
    loss, outputs = compute_loss(None, student, inputs, return_outputs=True)
    assert not teacher.training
    assert "labels" in inputs  # the batch is the trainer's
    torch.testing.assert_close(loss, expected(kind, student, teacher, inputs))
    assert outputs.logits.shape[0] == 4
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())
    wrapped = nn.DataParallel(student) if not torch.cuda.is_available() else student
    torch.testing.assert_close(compute_loss(None, wrapped, inputs), loss)


@pytest.mark.parametrize("kind", ["masked", "causal", "classifier"])
def test_micro_batches_sum_to_the_step(kind: str) -> None:
    """What the Trainer does with gradient accumulation: num_items_in_batch counts the whole step."""
    student, teacher = KINDS[kind](16), KINDS[kind](32)
    whole = batch(kind, 6)
    labels = whole["labels"][:, 1:] if kind == "causal" else whole["labels"]
    count = (labels != -100).sum()
    compute_loss = distillation_compute_loss(teacher, **OPTIONS)
    parts = [{name: x[a:b] for name, x in whole.items()} for a, b in ((0, 1), (1, 4), (4, 6))]
    total = sum(compute_loss(None, student, part, num_items_in_batch=count) for part in parts)
    torch.testing.assert_close(total, compute_loss(None, student, whole))


def test_without_labels_the_mask_says_what_counts() -> None:
    student, teacher = KINDS["masked"](16), KINDS["masked"](32)
    inputs = batch("masked")
    kept = inputs["attention_mask"].bool()
    del inputs["labels"]
    loss = distillation_compute_loss(teacher, temperature=2.0)(None, student, inputs)
    right = DistillationLoss(temperature=2.0)(student(**inputs).logits[kept], teacher(**inputs).logits[kept])
    torch.testing.assert_close(loss, right)
    student, teacher = KINDS["classifier"](16), KINDS["classifier"](32)
    loss = distillation_compute_loss(teacher)(None, student, inputs)
    torch.testing.assert_close(loss, DistillationLoss()(student(**inputs), teacher(**inputs)))


def test_inputs_that_only_the_student_knows() -> None:
    config = transformers.DistilBertConfig(
        vocab_size=VOCAB,
        dim=16,
        hidden_dim=16,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=16,
        num_labels=5,
    )
    teacher = transformers.DistilBertForSequenceClassification(config)
    student = KINDS["classifier"](16)
    inputs = batch("classifier") | {"token_type_ids": torch.zeros(4, LENGTH, dtype=torch.int64)}
    assert distillation_compute_loss(teacher)(None, student, inputs).isfinite()


def test_options_are_found_wrong_before_training() -> None:
    teacher = KINDS["classifier"](16)
    with pytest.raises(ValueError, match=r"temperature=0\.0 must be positive"):
        distillation_compute_loss(teacher, temperature=0.0)
    with pytest.raises(TypeError, match="alpha"):
        distillation_compute_loss(teacher, alpha=0.5)
    with pytest.raises(ValueError, match="reduction='sum' cannot be chosen"):
        distillation_compute_loss(teacher, reduction="sum")
    other = KINDS["masked"](16)
    with pytest.raises(ValueError, match="student_logits"):
        distillation_compute_loss(other)(None, teacher, batch("classifier"))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, kind: str, count: int) -> None:
        self.columns = batch(kind, count)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: x[i] for name, x in self.columns.items()}


def train(
    kind: str, student: nn.Module, teacher: nn.Module, folder: Path, steps: int, **arguments: Any
) -> Any:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

    class Distilling(transformers.Trainer):  # type: ignore[misc,name-defined]
        compute_loss = distillation_compute_loss(teacher, **OPTIONS)

    trainer = Distilling(
        model=student,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            max_steps=steps,
            max_grad_norm=0.0,
            **arguments,
        ),
        train_dataset=Rows(kind, 16),
        eval_dataset=Rows(kind, 16),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_trainer_trains_the_student_only(kind: str, tmp_path: Path) -> None:
    student, teacher = KINDS[kind](16), KINDS[kind](32)
    before = copy.deepcopy(teacher.state_dict())
    inputs = batch(kind, 16)
    with torch.no_grad():
        first = expected(kind, student, teacher, inputs)
    trainer = train(kind, student, teacher, tmp_path, 20, learning_rate=1e-2)
    with torch.no_grad():
        last = expected(kind, student, teacher, inputs)
    assert last < 0.9 * first
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(last), rel=0.05)
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("kind", ["classifier", "masked"])
def test_trainer_accumulates_gradients_as_one_batch(kind: str, tmp_path: Path) -> None:
    teacher, start = KINDS[kind](32), KINDS[kind](16)
    results = []
    for size, pieces in ((8, 1), (2, 4)):
        student = copy.deepcopy(start)
        train(
            kind,
            student,
            teacher,
            tmp_path,
            1,
            learning_rate=0.5,
            optim="sgd",
            lr_scheduler_type="constant",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces,
        )
        results.append(student.state_dict())
    moved = 0.0
    for name, x in results[0].items():
        torch.testing.assert_close(results[1][name], x, rtol=1e-4, atol=1e-6)
        moved += float((x - start.state_dict()[name]).abs().sum())
    assert moved > 0
