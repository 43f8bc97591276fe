"""Saved folders: what comes back, what is refused, and what a crash leaves behind."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lissom
from lissom import _atomic, _golden, io
from lissom.nn import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear
from lissom.testing import INT4_FORMS, Int4Form, int4_weights

VOCAB, WIDTH = 50, 32


def ramp(width: int) -> Tensor:
    # Not torch.linspace: transformers replaces it while it builds a model, and torch.device("meta") keeps
    # to the constructors that it found at its first use.
    return torch.ones(width).cumsum(0) / width


class Net(nn.Module):
    """A bit of everything: tied weights, a shared module, both kinds of buffers, a frozen parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = WIDTH, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 48, bias=bias)
        self.down = nn.Linear(48, width)
        self.again = self.up
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 1.5))
        self.register_buffer("ramp", ramp(width), persistent=False)
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids) + self.ramp)
        for up in (self.up, self.again):
            x = x + self.down(torch.relu(up(x)))
        return self.head(self.drop(x * self.frozen)) * self.scale


def ids(rows: int = 3) -> Tensor:
    return torch.randint(VOCAB, (rows, 7), generator=torch.Generator().manual_seed(0))


INT8 = lissom.Int8(prefer="size")
RECIPES: dict[str, Any] = {
    "int8": INT8,
    "int4": lissom.Int4(prefer="size"),
    "all in int4": lissom.Int4(group_size=32, symmetric=True, embeddings="int4", prefer="size"),
    "mixed": {"up": INT8, "down": lissom.Int4(codebook="nf4", activation=None, prefer="size"), "*": INT8},
}


def compressed(recipe: Any = INT8, **options: Any) -> Net:
    torch.manual_seed(1)
    net = Net(**options).eval()
    report = lissom.compress_(net, recipe, example_inputs=ids())
    assert {layer.status for layer in report.layers} == {"converted"}
    return net


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lissom.save(compressed(), tmp_path_factory.mktemp("pristine") / "net")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A saved ``Net`` that the test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "net"))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids())


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that a failed load must not change, by identity."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [
        (name, id(t), t.requires_grad, t.detach().clone())
        for m in model.modules()
        for name, t in (*m._parameters.items(), *m._buffers.items())
        if t is not None
    ]
    return [*modules, *tensors]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    after = snapshot(model)
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert old[:3] == new[:3]
        if len(old) == 4:
            assert torch.equal(old[3], new[3])


def refused(folder: Path, *parts: str, model: nn.Module | None = None, check: bool = True) -> None:
    """Loading raises a FormatError that holds ``parts`` on one line, and leaves the given model as it was."""
    model = Net() if model is None else model
    before = snapshot(model)
    with pytest.raises(lissom.FormatError) as raised:
        lissom.load(folder, model=model, check=check)
    message = str(raised.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message
    assert_unchanged(model, before)


def edit_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "lissom.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors and keep size and checksum right, as someone who alters a file on purpose would."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    fix_checksum(folder, "model.safetensors")


def fix_checksum(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_json(folder, lambda data: data["files"].update({name: entry}))


# ------------------------------------------------------------------------------------------------ round trips


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        other = b.state_dict()[name]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip_is_bit_identical(tmp_path: Path, recipe: str) -> None:
    net = compressed(RECIPES[recipe])
    folder = lissom.save(net, tmp_path / "net")
    fresh = Net()
    state = torch.get_rng_state()
    loaded = lissom.load(folder, model=fresh)
    assert torch.equal(state, torch.get_rng_state())
    assert loaded is fresh
    assert torch.equal(output(loaded), output(net))
    assert_same_state(loaded, net)
    types = [type(m) for m in net.modules()]
    assert [type(m) for m in loaded.modules()] == types
    assert loaded.embed.qweight is loaded.head.qweight
    assert loaded.embed.weight_scale is loaded.head.weight_scale
    record = lissom.compress.get_record(loaded)
    assert record is not None
    assert record == {**lissom.compress.get_record(net), "example_inputs": record["example_inputs"]}


def test_the_folder_holds_two_files_without_pickle_and_can_be_read_by_safetensors(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["lissom.json", "model.safetensors"]
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert tensors["up.qweight"].dtype == torch.int8
    assert tuple(tensors["up.qweight"].shape) == (48, WIDTH)
    assert not [name for name in tensors if "packed" in name or "_like" in name]


def test_int4_files_hold_two_weights_a_byte_and_nothing_packed(tmp_path: Path) -> None:
    folder = lissom.save(compressed(RECIPES["all in int4"]), tmp_path / "net")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    sizes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name.startswith(("up", "emb"))}
    assert sizes == {
        "embed.qweight": (torch.uint8, (VOCAB, WIDTH // 2)),
        "embed.weight_scale": (torch.float16, (VOCAB, 1)),
        "up.qweight": (torch.uint8, (48, WIDTH // 2)),
        "up.weight_scale": (torch.float16, (48, 1)),
        "up.bias": (torch.float32, (48,)),
    }


def test_ties_and_shared_modules_are_stored_once_and_come_back(folder: Path) -> None:
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    assert len({"embed.qweight", "head.qweight"} & names) == 1
    assert len({"up.qweight", "again.qweight"} & names) == 1
    loaded = lissom.load(folder, model=Net())
    assert loaded.embed.qweight is loaded.head.qweight
    assert loaded.embed.weight_scale is loaded.head.weight_scale
    assert loaded.again is loaded.up


def test_tied_parameters_come_back_tied_though_the_fresh_model_is_not(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    loaded = lissom.load(lissom.save(Pair(True), tmp_path / "m"), model=Pair(False))
    assert loaded.a.weight is loaded.b.weight
    assert loaded.a.bias is not loaded.b.bias


def test_tensors_that_overlap_without_being_the_same_are_stored_apart(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.detach().t())
    fresh = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    loaded = lissom.load(lissom.save(net, tmp_path / "m"), model=fresh)
    assert torch.equal(loaded[1].weight, net[1].weight)
    assert loaded[1].weight.untyped_storage().nbytes() == 64


def test_modes_and_requires_grad_come_back(tmp_path: Path) -> None:
    net = compressed().train()
    net.norm.eval()
    fresh = Net().eval()
    fresh.frozen.requires_grad_(True)
    loaded = lissom.load(lissom.save(net, tmp_path / "m"), model=fresh)
    assert {n: m.training for n, m in loaded.named_modules()} == {
        n: m.training for n, m in net.named_modules()
    }
    assert loaded.training
    assert not loaded.norm.training
    assert not loaded.frozen.requires_grad
    assert loaded.up.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_in_parameters_and_in_buffers_that_are_not_saved(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    net = compressed(dtype=dtype)
    loaded = lissom.load(lissom.save(net, tmp_path / "m"), model=Net())
    assert loaded.norm.weight.dtype == loaded.up.bias.dtype == loaded.ramp.dtype == dtype
    assert loaded.up.weight_scale.dtype == torch.float32
    assert torch.equal(output(loaded), output(net))


def test_half_precision_of_int4_layers(tmp_path: Path) -> None:
    net = compressed(RECIPES["all in int4"], dtype=torch.bfloat16)
    loaded = lissom.load(lissom.save(net, tmp_path / "m"), model=Net())
    assert loaded.embed.weight.dtype == loaded.up.weight.dtype == loaded.up.bias.dtype == torch.bfloat16
    assert loaded.up.weight_scale.dtype == torch.float16
    assert torch.equal(output(loaded), output(net))


def test_a_fresh_compressed_model_and_a_model_on_meta_can_be_filled(folder: Path) -> None:
    expected = output(compressed())
    assert torch.equal(output(lissom.load(folder, model=compressed())), expected)
    with torch.device("meta"):
        empty = Net()
    empty.ramp = ramp(WIDTH)
    assert torch.equal(output(lissom.load(folder, model=empty)), expected)


def test_a_buffer_left_on_meta_is_named(folder: Path) -> None:
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(lissom.FormatError, match="'ramp' is on the meta device"):
        lissom.load(folder, model=empty)
    assert empty.embed.weight.is_meta


@pytest.mark.parametrize(
    "layer",
    [
        Int8Linear.from_linear(nn.Linear(5, 3), act_fn="gelu"),
        Int8Linear.from_linear(nn.Linear(5, 3), lissom.Int8(activation="static"), input_scale=0.1),
        Int8Linear.from_linear(nn.Linear(5, 3, bias=False), lissom.Int8(activation=None)),
        Int8Embedding.from_embedding(nn.Embedding(7, 5, padding_idx=2)),
    ],
    ids=str,
)
def test_a_single_layer_needs_no_model(tmp_path: Path, layer: nn.Module) -> None:
    x = torch.tensor([[0, 6]]) if isinstance(layer, Int8Embedding) else torch.randn(2, 5)
    loaded = lissom.load(lissom.save(layer, tmp_path / "layer", example_inputs=x))
    assert type(loaded) is type(layer)
    assert loaded.extra_repr() == layer.extra_repr()
    assert torch.equal(loaded(x), layer(x))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": None, "act_fn": "gelu", "dtype": torch.bfloat16},
    {"act_fn": "relu"},
]


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_form_of_an_int4_linear(tmp_path: Path, form: Int4Form, options: dict[str, Any]) -> None:
    bias = torch.randn(9) if "act_fn" in options else None
    layer = Int4Linear.from_weights(int4_weights(9, 171, form), bias, **options)
    if not form.group_index and not options:
        layer.rotated = True
    folder = lissom.save(layer, tmp_path / "layer", example_inputs=torch.randn(2, 171))
    loaded = lissom.load(folder)
    assert loaded.extra_repr() == layer.extra_repr()
    assert loaded.weight.dtype == layer.weight.dtype
    assert_same_state(loaded, layer)
    x = torch.randn(3, 171)
    assert torch.equal(loaded(x), layer(x))
    expected = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    summary = lissom.io.inspect(folder)
    assert summary["layers"][""]["bytes"] == expected
    assert summary["parameters"] == 9 * 171 + (0 if bias is None else 9)


@pytest.mark.parametrize("form", [f for f in INT4_FORMS if not f.codebook and not f.group_index], ids=str)
def test_every_form_of_an_int4_embedding(tmp_path: Path, form: Int4Form) -> None:
    weights = int4_weights(11, 37, form)
    options = {"symmetric": form.zero is None, "zero_dtype": form.zero or torch.uint8}
    layer = Int4Embedding(11, 37, 3, group_size=form.group_size, scale_dtype=form.scale, **options)
    layer.load_state_dict({name: getattr(weights, name) for name in layer.state_dict()})
    loaded = lissom.load(lissom.save(layer.half(), tmp_path / "layer", example_inputs=torch.arange(11)))
    assert loaded.extra_repr() == layer.extra_repr()
    assert_same_state(loaded, layer)
    assert loaded.weight.dtype == torch.float16
    assert torch.equal(loaded(torch.arange(11)), layer(torch.arange(11)))


def test_a_model_that_was_never_compressed(tmp_path: Path) -> None:
    net = Net().eval()
    loaded = lissom.load(lissom.save(net, tmp_path / "m"), model=Net())
    assert torch.equal(output(loaded), output(net))
    assert lissom.compress.get_record(loaded) is None


def test_recipe_and_report_come_back(folder: Path) -> None:
    loaded = lissom.load(folder, model=Net())
    record = lissom.compress.get_record(loaded)
    assert record is not None
    assert record["recipe"]["prefer"] == "size"
    assert torch.equal(record["example_inputs"], ids()[:2])
    assert [layer.name for layer in lissom.Report.from_dict(record["report"]).layers]
    again = lissom.save(loaded, folder, overwrite=True)
    assert torch.equal(output(lissom.load(again, model=Net())), output(loaded))


def test_inspect_tells_without_a_model(folder: Path) -> None:
    summary = lissom.io.inspect(folder)
    assert summary["build"] == {"kind": "user", "class": f"{__name__}.Net"}
    assert summary["layers"]["up"]["class"] == "Int8Linear"
    assert summary["layers"]["up"]["bytes"] == 48 * WIDTH + 4 * 48 + 4 * 48
    assert summary["total_bytes"] == (folder / "model.safetensors").stat().st_size
    assert summary["parameters"] == sum(p.numel() for p in Net().parameters()) + 1  # the buffer `scale`
    assert summary["golden"] is True
    json.dumps(summary)


# --------------------------------------------------------------------------------------------------- golden


def test_golden_finds_changed_weights_and_check_false_skips_it(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"down.qweight": -t["down.qweight"]}))
    refused(folder, "lissom.json", "golden", "output 0 is off by", "check=False")
    lissom.load(folder, model=Net(), check=False)


def test_golden_finds_changed_code(folder: Path) -> None:
    class Other(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)[..., :5]

    refused(folder, "golden", "float outputs of sizes", model=Other())


def test_golden_input_out_of_range(folder: Path) -> None:
    edit_tensors(folder, lambda t: t["__lissom__.input.0"].fill_(VOCAB))
    refused(folder, "golden", f"index {VOCAB} is out of range for a table of {VOCAB} rows", "altered")


def test_golden_keeps_two_rows_and_a_sample(tmp_path: Path) -> None:
    net = nn.Linear(4, 3000)
    folder = lissom.save(net, tmp_path / "m", example_inputs=torch.randn(100, 4))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert tensors["__lissom__.input.0"].shape == (2, 4)
    assert tensors["__lissom__.output.0"].shape == (4096,)
    lissom.load(folder, model=nn.Linear(4, 3000))


def test_golden_takes_keywords_nested_values_and_several_outputs(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, pair: tuple[Tensor, float], flags: dict[str, Any]) -> dict[str, Any]:
            assert flags == {"on": True, "name": "a", "none": None, "list": [1, 2.5]}
            return {"y": self.lin(x) + pair[0] * pair[1], "ids": x.argmax(-1), "more": [x.double(), None]}

    inputs = {
        "x": torch.randn(5, 4),
        "pair": (torch.randn(4), 0.5),
        "flags": {"on": True, "name": "a", "none": None, "list": [1, 2.5]},
    }
    folder = lissom.save(Many(), tmp_path / "m", example_inputs=inputs)
    lissom.load(folder, model=Many())
    edit_tensors(folder, lambda t: t["lin.weight"].neg_())
    refused(folder, "output 0 is off", model=Many())


@pytest.mark.parametrize(
    ("y", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([1.0, 0.0], [0.0, 0.0], float("inf")),
        ([3.0, 4.0], [0.0, 5.0], (10 / 25) ** 0.5),
    ],
)
def test_relative_error(y: list[float], reference: list[float], expected: float) -> None:
    assert _golden._relative_error(torch.tensor(y), torch.tensor(reference)) == pytest.approx(expected)


def test_inputs_that_cannot_be_stored(tmp_path: Path) -> None:
    class Any_(nn.Module):
        def forward(self, x: Tensor, other: Any) -> Tensor:
            return x

    with pytest.raises(
        ValueError, match="example_inputs hold a object, which cannot be stored without pickle"
    ):
        lissom.save(Any_(), tmp_path / "m", example_inputs=(torch.ones(1), object()))
    with pytest.raises(RuntimeError, match="example_inputs: the model raised"):
        lissom.save(Net(), tmp_path / "m", example_inputs=torch.full((1, 1), VOCAB))
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- bad folders on load


def test_no_folder_a_file_and_a_foreign_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", str(tmp_path / "none"), "does not exist", "lissom.save")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "hf", "holds no lissom.json", "lissom compress")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    refused(folder, str(path), f"lissom.json says {len(content)}", "truncated", "copy it again")


def test_altered_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    refused(folder, str(path), "sha256", "altered")


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", "missing")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x10" + b"\0" * 7 + b'{"a":{"dtype":1}', b"PK\x03\x04" * 9]
)
def test_foreign_weights_with_a_right_checksum(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    fix_checksum(folder, "model.safetensors")
    refused(folder, "model.safetensors", "not a valid safetensors file")


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '{"a": NaN}', "[" * 100_000, "\x00"])
def test_broken_json(folder: Path, text: str) -> None:
    (folder / "lissom.json").write_text(text)
    refused(folder, "lissom.json", "not valid JSON")


def test_json_that_is_not_text(folder: Path) -> None:
    (folder / "lissom.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "lissom.json", "not valid JSON")


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"format": "other"}'])
def test_json_of_something_else(folder: Path, text: str) -> None:
    (folder / "lissom.json").write_text(text)
    refused(folder, "lissom.json", "'format' is not 'lissom'")


def test_newer_version_says_to_upgrade(folder: Path) -> None:
    edit_json(folder, lambda data: data.update(format_version=io.FORMAT_VERSION + 1))
    refused(folder, f"format_version={io.FORMAT_VERSION + 1} is newer", "pip install -U lissom")


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.5])
def test_version_that_is_none(folder: Path, version: Any) -> None:
    edit_json(folder, lambda data: data.update(format_version=version))
    refused(folder, "format_version=", "not a version number")


FIELDS = (
    "written_by",
    "files",
    "build",
    "layers",
    "shared_modules",
    "tied",
    "frozen",
    "training",
    "buffer_dtypes",
)


@pytest.mark.parametrize("name", [*FIELDS, "recipe", "report", "golden"])
@pytest.mark.parametrize("value", ["missing", 7, "text", [[]], {"a": [1]}])
def test_fields_of_the_wrong_type(folder: Path, name: str, value: Any) -> None:
    original = json.loads((folder / "lissom.json").read_text())
    if value == "missing":
        edit_json(folder, lambda data: data.pop(name))
        refused(folder, f"the key {name!r} is missing")
        return
    if name == "written_by" and isinstance(value, dict):
        pytest.skip("written_by is free text for people")
    edit_json(folder, lambda data: data.update({name: value}))
    assert original[name] != value
    refused(folder, "lissom.json")


def test_unknown_key(folder: Path) -> None:
    edit_json(folder, lambda data: data.update(surprise=1))
    refused(folder, "unknown key 'surprise'")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "lissom.json", "a\\b", "a\0b"])
def test_file_names_cannot_leave_the_folder(folder: Path, name: str) -> None:
    edit_json(folder, lambda data: data["files"].update({name: {"bytes": 0, "sha256": ""}}))
    refused(folder, "files[", "is not a plain file name")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda up: up.update({"class": "Linear"}),
            ["layers['up']", "class 'Linear' is unknown", "Int8Linear"],
        ),
        (lambda up: up.update({"class": "os.system"}), ["class 'os.system' is unknown"]),
        (lambda up: up.update({"class": ["Int8Linear"]}), ["is unknown"]),
        (lambda up: up["args"].update(device="cuda"), ["argument 'device' is missing or unknown"]),
        (lambda up: up["args"].pop("bias"), ["argument 'bias' is missing or unknown"]),
        (lambda up: up["args"].update(bias=1), ["bias=1 is not valid"]),
        (lambda up: up["args"].update(in_features=-1), ["in_features=-1 is not valid"]),
        (lambda up: up["args"].update(in_features=2**62), ["is not valid"]),
        (
            lambda up: up["args"].update(in_features=31),
            ["'up.qweight' is int8 [48, 32]", "says int8 [48, 31]"],
        ),
        (lambda up: up["args"].update(in_features="32"), ["in_features='32' is not valid"]),
        (lambda up: up["args"].update(activation="magic"), ["activation='magic'"]),
        (lambda up: up["args"].update(activation="static"), ["'up.input_scale' is missing"]),
        (lambda up: up["args"].update(act_fn="exec"), ["act_fn='exec'"]),
        (lambda up: up["args"].update(dtype="int8"), ["dtype='int8' is not valid"]),
        (lambda up: up["args"].update(dtype="Tensor"), ["dtype='Tensor' is not valid"]),
    ],
)
def test_altered_layer_entry(folder: Path, change: Callable[[Any], Any], parts: list[str]) -> None:
    edit_json(folder, lambda data: change(data["layers"]["up"]))
    refused(folder, *parts)


@pytest.mark.parametrize("value", [VOCAB, VOCAB + 7, -1, 0.5, True])
def test_padding_idx_out_of_range(folder: Path, value: Any) -> None:
    edit_json(folder, lambda data: data["layers"]["embed"]["args"].update(padding_idx=value))
    refused(folder, "layers['embed']", f"padding_idx={value}")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t["down.qweight"][1].fill_(-128), "'down.qweight' holds -128, outside [-127, 127]"),
        (lambda t: t["down.weight_scale"][1].fill_(float("nan")), "'down.weight_scale' holds nan"),
        (lambda t: t["down.weight_scale"][1].fill_(float("inf")), "'down.weight_scale' holds inf"),
        (lambda t: t["down.weight_scale"][1].fill_(-1), "'down.weight_scale' holds -1.0"),
        (lambda t: t.update({"down.weight_scale": t["down.weight_scale"].half()}), "float16"),
        (lambda t: t.update({"down.qweight": t["down.qweight"].int()}), "int32"),
        (lambda t: t.update({"down.qweight": t["down.qweight"].flatten()}), f"[{48 * WIDTH}]"),
        (lambda t: t.update({"down.bias": t["down.bias"].int()}), "int32"),
        (lambda t: t.pop("down.qweight"), "'down.qweight' is missing"),
        (lambda t: t.pop("norm.weight"), "'norm.weight' is missing in the file"),
        (lambda t: t.update({"new": torch.ones(1)}), "'new' is in the file but not in the model"),
        (
            lambda t: t.update({"norm.weight": torch.ones(3)}),
            "'norm.weight' is float32 [3], but the model has",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(WIDTH).int()}), "'norm.weight' is int32"),
        (lambda t: t.pop("__lissom__.input.0"), "golden"),
        (
            lambda t: t.update({"__lissom__.extra": torch.ones(1)}),
            "'__lissom__.extra' is missing, or not listed",
        ),
    ],
)
def test_altered_tensors(folder: Path, change: Callable[[Any], Any], part: str) -> None:
    edit_tensors(folder, change)
    refused(folder, part, check=False)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_altered_input_scale(tmp_path: Path, value: float) -> None:
    layer = Int8Linear.from_linear(nn.Linear(5, 3), lissom.Int8(activation="static"), input_scale=0.1)
    folder = lissom.save(layer, tmp_path / "layer")
    edit_tensors(folder, lambda t: t["input_scale"].fill_(value))
    with pytest.raises(lissom.FormatError, match="'input_scale' holds"):
        lissom.load(folder)


@pytest.fixture(scope="module")
def pristine_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two linears and an embedding: zero-points and group indices, tables per group, plain."""
    columns = 101
    up = int4_weights(columns, 70, Int4Form(32, torch.float16, group_index=True))
    down = int4_weights(6, columns, Int4Form(32, codebook="group"))
    embed = int4_weights(VOCAB, 70, Int4Form(64))
    net = nn.Sequential(
        Int4Embedding(VOCAB, 70, group_size=64), Int4Linear.from_weights(up), Int4Linear.from_weights(down)
    )
    net[0].load_state_dict({"qweight": embed.qweight, "weight_scale": embed.weight_scale})
    folder = tmp_path_factory.mktemp("pristine") / "int4"
    return lissom.save(net, folder, example_inputs=ids())


@pytest.fixture
def folder4(pristine_int4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_int4, tmp_path / "int4"))


def dense4() -> nn.Module:
    columns = 101
    linears = nn.Linear(70, columns, bias=False), nn.Linear(columns, 6, bias=False)
    return nn.Sequential(nn.Embedding(VOCAB, 70), *linears)


def test_the_int4_folder_is_sound_as_long_as_nobody_touches_it(folder4: Path) -> None:
    model = lissom.load(folder4, model=dense4())
    assert [type(m) for m in model] == [Int4Embedding, Int4Linear, Int4Linear]
    edit_tensors(folder4, lambda t: t["1.weight_scale"].neg_())  # legal, if not what was saved
    lissom.load(folder4, model=dense4(), check=False)
    refused(folder4, "golden", "output 0 is off", model=dense4())


@pytest.mark.parametrize(
    ("layer", "changes", "parts"),
    [
        *(
            ("1", {"group_size": size}, [f"group_size={size!r}"])
            for size in (0, -2, 33, 2**70, "32", True, 32.0, -1.0, None, [32])
        ),
        ("1", {"group_size": 64}, ["'1.weight_scale' is float16 [101, 3]", "[101, 2]"]),
        ("1", {"group_size": -1}, ["group_index=True has no meaning with group_size=-1"]),
        ("1", {"in_features": 69}, ["'1.group_index' is int32 [70]", "[69]"]),
        ("2", {"in_features": 102}, ["'2' was saved as", "in_features=102"]),
        ("1", {"in_features": 2**39, "out_features": 2**39}, ["layers['1']"]),
        ("1", {"symmetric": True}, ["'1.zero_point' is in the file but not in the model"]),
        ("1", {"symmetric": "yes"}, ["symmetric='yes' is not valid"]),
        ("2", {"symmetric": False}, ["symmetric=False has no meaning with a codebook"]),
        ("1", {"group_index": False}, ["'1.group_index' is in the file but not in the model"]),
        ("2", {"group_index": True}, ["'2.group_index' is missing"]),
        ("2", {"group_index": None}, ["group_index=None is not valid"]),
        ("2", {"codebook": None}, ["'2.codebook' is in the file but not in the model"]),
        ("2", {"codebook": "channel"}, ["'2.codebook' is float32 [6, 4, 16]", "[6, 16]"]),
        ("2", {"codebook": "planet"}, ["codebook='planet' cannot be"]),
        ("2", {"codebook": ["group"]}, ["codebook=['group'] is not valid"]),
        ("2", {"activation": "dynamic"}, ["activation='dynamic' cannot be"]),
        ("2", {"act_fn": "exec"}, ["act_fn='exec' is unknown"]),
        ("1", {"rotated": True}, ["group_index=True cannot go with rotated=True"]),
        ("2", {"rotated": True, "activation": None}, ["rotated=True has no use"]),
        ("1", {"scale_dtype": "float32"}, ["'1.weight_scale' is float16", "says float32"]),
        ("1", {"scale_dtype": "float64"}, ["scale_dtype='float64' is not valid"]),
        ("1", {"scale_dtype": "uint8"}, ["scale_dtype='uint8' is not valid"]),
        ("1", {"zero_dtype": "uint8"}, ["'1.zero_point' is float16", "says uint8"]),
        ("1", {"zero_dtype": "int8"}, ["zero_dtype='int8' is not valid"]),
        ("1", {"zero_dtype": "Tensor"}, ["zero_dtype='Tensor' is not valid"]),
        ("1", {"table_dtype": "float32"}, ["argument 'table_dtype' is missing or unknown"]),
        ("0", {"group_size": 32}, ["'0.weight_scale' is float16 [50, 2]", "[50, 3]"]),
        ("0", {"padding_idx": VOCAB}, [f"padding_idx={VOCAB}"]),
        ("0", {"codebook": "tensor"}, ["argument 'codebook' is missing or unknown"]),
    ],
)
def test_altered_int4_entry(folder4: Path, layer: str, changes: dict[str, Any], parts: list[str]) -> None:
    edit_json(folder4, lambda data: data["layers"][layer]["args"].update(changes))
    refused(folder4, *parts, model=dense4(), check=False)


def swap_groups(t: dict[str, Tensor]) -> None:
    index = t["1.group_index"]
    index[(index == 0).nonzero()[0]] = 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t["1.weight_scale"][7, 1].fill_(float("nan")), "'1': weight_scale holds nan at [7, 1]"),
        (lambda t: t["0.weight_scale"][7, 1].fill_(float("-inf")), "'0': weight_scale holds -inf at [7, 1]"),
        (lambda t: t["1.zero_point"][2, 0].fill_(float("inf")), "'1': zero_point holds inf at [2, 0]"),
        (lambda t: t["2.codebook"][5, 3, 15].fill_(float("nan")), "'2': codebook holds nan at [5, 3, 15]"),
        (lambda t: t["2.qweight"][4, -1].fill_(0x10), "'2': qweight has a code in the last high nibble"),
        (lambda t: t["1.group_index"][0].fill_(-1), "'1': group_index holds -1; use 0 to 2"),
        (lambda t: t["1.group_index"][69].fill_(3), "'1': group_index holds 3; use 0 to 2"),
        (lambda t: t["1.group_index"].fill_(2**31 - 1), "'1': group_index holds 2147483647; use 0 to 2"),
        (swap_groups, "'1': group_index puts 31 columns into group 0, which must have 32"),
        (lambda t: t["1.group_index"].fill_(0), "'1': group_index puts 70 columns into group 0"),
        (lambda t: t.update({"1.group_index": t["1.group_index"].long()}), "'1.group_index' is int64 [70]"),
        (lambda t: t.update({"1.group_index": t["1.group_index"][:69].clone()}), "is int32 [69]"),
        (lambda t: t.update({"1.qweight": t["1.qweight"].to(torch.int8)}), "'1.qweight' is int8 [101, 35]"),
        (lambda t: t.update({"1.qweight": t["1.qweight"][:, :34].clone()}), "'1.qweight' is uint8 [101, 34]"),
        (lambda t: t.update({"1.weight_scale": t["1.weight_scale"].float()}), "'1.weight_scale' is float32"),
        (lambda t: t.update({"1.zero_point": t["1.zero_point"].to(torch.uint8)}), "'1.zero_point' is uint8"),
        (lambda t: t.update({"2.codebook": t["2.codebook"].half()}), "'2.codebook' is float16 [6, 4, 16]"),
        (lambda t: t.update({"2.codebook": t["2.codebook"][..., :15].clone()}), "is float32 [6, 4, 15]"),
        (lambda t: t.update({"2.codebook": t["2.codebook"][0, 0].clone()}), "'2.codebook' is float32 [16]"),
        (lambda t: t.pop("2.codebook"), "'2.codebook' is missing"),
        (lambda t: t.pop("1.zero_point"), "'1.zero_point' is missing"),
        (lambda t: t.update({"2.zero_point": t["2.weight_scale"] * 0}), "'2.zero_point' is in the file but"),
    ],
)
def test_altered_int4_tensors(folder4: Path, change: Callable[[Any], Any], part: str) -> None:
    edit_tensors(folder4, change)
    refused(folder4, part, model=dense4(), check=False)
    if "not in the" not in part and "in the file but" not in part:
        with pytest.raises(lissom.FormatError, match=re.escape(part)):
            io.inspect(folder4)


def test_golden_finds_changed_int4_codes(folder4: Path) -> None:
    edit_tensors(folder4, lambda t: t["2.qweight"].bitwise_xor_(0x0F))
    refused(folder4, "golden", "output 0 is off by", model=dense4())


def test_a_single_int4_layer_with_bad_values_is_named(tmp_path: Path) -> None:
    layer = Int4Linear.from_weights(int4_weights(3, 5, Int4Form(32)))
    folder = lissom.save(layer, tmp_path / "layer")
    edit_tensors(folder, lambda t: t["weight_scale"].fill_(float("nan")))
    with pytest.raises(lissom.FormatError, match=r"the layer: weight_scale holds nan at \[0, 0\]"):
        lissom.load(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda d: d.update(tied=[["up.qweight", "no.such"], ["none", "up.bias"]]),
            "tied ['none', 'up.bias']",
        ),
        (lambda d: d.update(tied=[["up.qweight", "up.qweight"]]), "tied"),
        (lambda d: d.update(frozen=["no.such"]), "frozen: 'no.such' is no parameter"),
        (lambda d: d.update(shared_modules={"again": "nothing"}), "shared_modules['again']='nothing'"),
        (lambda d: d["build"].update(kind="layer"), "build.kind='layer'"),
        (lambda d: d["build"].update(kind="pickle"), "build.kind='pickle'"),
        (lambda d: d["golden"].update(inputs=10**9), "golden.inputs=1000000000"),
        (lambda d: d["golden"].update(args=[{"tensor": 0}]), "golden"),
        (lambda d: d["golden"].update(args={"list": [{"tensor": 1}]}), "{'tensor': 1} is not an argument"),
        (lambda d: d["golden"].update(args={"list": [{"call": "os.system"}]}), "is not an argument"),
        (lambda d: d["recipe"].update(kind="int7"), "kind='int7' is unknown"),
        (lambda d: d["report"].update(surprise=1), "unknown key 'surprise'"),
    ],
)
def test_altered_json(folder: Path, change: Callable[[Any], Any], part: str) -> None:
    edit_json(folder, change)
    refused(folder, part)


# ------------------------------------------------------------------------------------- models that do not fit


def test_a_model_is_needed(folder: Path) -> None:
    with pytest.raises(
        lissom.FormatError, match=r"was saved from a .*Net, whose code is not in the file.*model="
    ):
        lissom.load(folder)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Net(width=16), "the model has Embedding(50, 16"),
        (lambda: Net(bias=False), "'up' was saved as Int8Linear(in_features=32, out_features=48, bias=True"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "does not exist in the given Sequential"),
        (lambda: nn.Linear(2, 2), "does not exist in the given Linear"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(
    folder: Path, make: Callable[[], nn.Module], part: str
) -> None:
    refused(folder, part, model=make())


def test_another_module_in_the_place_of_a_layer(folder: Path) -> None:
    model = Net()
    model.down = nn.Conv1d(48, WIDTH, 1)
    refused(folder, "'down' was saved as Int8Linear(in_features=48", "Conv1d", model=model)


def test_a_device_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    model = Net()
    before = snapshot(model)
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        lissom.load(folder, model=model, device="cuda")
    assert_unchanged(model, before)


# --------------------------------------------------------------------------------------- where save may write


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_save_needs_overwrite_for_an_earlier_save(folder: Path) -> None:
    before = tree(folder.parent)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        lissom.save(compressed(), folder)
    assert tree(folder.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_save_refuses_a_folder_that_holds_something_else(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex, which lissom did not write.*new or empty"):
        lissom.save(nn.Linear(2, 2), tmp_path, overwrite=overwrite)
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


def test_save_refuses_an_earlier_save_with_something_added(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    before = tree(folder)
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        lissom.save(compressed(), folder, overwrite=True)
    assert tree(folder) == before


def test_save_refuses_a_folder_whose_manifest_it_cannot_read(folder: Path) -> None:
    (folder / "lissom.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds lissom\.json, model\.safetensors"):
        lissom.save(compressed(), folder, overwrite=True)


def test_save_onto_a_file_and_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        lissom.save(nn.Linear(2, 2), tmp_path / "file", overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file, so"):
        lissom.save(nn.Linear(2, 2), tmp_path / "file" / "a" / "b")
    assert tree(tmp_path) == {"file": b"x"}


def test_save_into_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root ignores permission bits, so what the system answers is simulated.
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: False if Path(p) == tmp_path else real(p, mode))
    with pytest.raises(PermissionError, match=r"is read-only; choose another folder"):
        lissom.save(nn.Linear(2, 2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_save_into_a_folder_that_turns_out_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OSError, match=r"cannot write in .*\(Read-only file system\); choose a folder"):
        lissom.save(nn.Linear(2, 2), tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_save_into_a_really_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=0o555)
    with pytest.raises(PermissionError, match="is read-only"):
        lissom.save(nn.Linear(2, 2), tmp_path / "ro" / "out")


def test_save_makes_parents_and_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = lissom.save(nn.Linear(2, 2), tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert not [p for p in (tmp_path / "a").iterdir() if p.name != "b"]


def test_save_extra_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("hello")
    folder = lissom.save(nn.Linear(2, 2), tmp_path / "out", extra_files=[tmp_path / "vocab.txt"])
    assert (folder / "vocab.txt").read_text() == "hello"
    lissom.save(nn.Linear(2, 2), folder, overwrite=True)
    assert not (folder / "vocab.txt").exists()
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt is not a file"):
        lissom.save(nn.Linear(2, 2), tmp_path / "o2", extra_files=[tmp_path / "nothing.txt"])
    (tmp_path / "lissom.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lissom\.json is written by lissom\.save itself"):
        lissom.save(nn.Linear(2, 2), tmp_path / "o2", extra_files=[tmp_path / "lissom.json"])


def test_save_refuses_what_needs_pickle_or_has_no_data(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"anything": 1}

    with pytest.raises(ValueError, match="'_extra_state' is a dict, not a tensor"):
        lissom.save(Extra(2, 2), tmp_path / "m")
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        lissom.save(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    reserved = nn.Module()
    reserved.add_module("__lissom__", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="reserved"):
        lissom.save(reserved, tmp_path / "m")

    class Mine(Int8Linear):
        pass

    with pytest.raises(ValueError, match=r"Mine is not a layer that the file format knows"):
        lissom.save(nn.Sequential(Mine(2, 2)), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- crashes


class Crash(BaseException):
    """Stands for SIGKILL: from the chosen call on, no file system call is made any more."""


STEPS = (
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "write_text"),
    (os, "fsync"),
    (shutil, "copyfile"),
    (shutil, "rmtree"),
    (safetensors.torch, "save_file"),
    (_atomic, "_exchange"),
)


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], Any]:
    """``crash_at(k, after)`` makes the k-th step (before or after it took effect) the last one."""

    def arm(k: int, after: bool) -> dict[str, Any]:
        seen: dict[str, Any] = {"steps": [], "dead": False}

        def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                if seen["dead"]:
                    raise Crash(name)
                seen["steps"].append(name)
                last = len(seen["steps"]) == k
                if last and not after:
                    seen["dead"] = True
                    raise Crash(name)
                result = real(*args, **kwargs)
                if last:
                    seen["dead"] = True
                    raise Crash(name)
                return result

            return step

        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, wrap(name, getattr(owner, name)))
        return seen

    return arm


def two_nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return tuple(Int8Linear.from_linear(nn.Linear(6, 4)) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_step_leaves_the_old_folder_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: Any, exchange: bool, after: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(_atomic, "_exchange", lambda a, b: False)
    old, new = two_nets()
    (tmp_path / "vocab.txt").write_text("v")
    outcomes = []
    for k in range(1, 60):
        parent = tmp_path / f"{k}"
        lissom.save(old, parent / "net")
        with monkeypatch.context():
            seen = crash_at(k, after)
            with contextlib.suppress(Crash):
                lissom.save(new, parent / "net", overwrite=True, extra_files=[tmp_path / "vocab.txt"])
            monkeypatch.undo()
            if not exchange:
                monkeypatch.setattr(_atomic, "_exchange", lambda a, b: False)
        loaded = lissom.load(parent / "net")
        is_old, is_new = (torch.equal(loaded.qweight, net.qweight) for net in (old, new))
        assert is_old != is_new
        outcomes.append("old" if is_old else "new")
        # The next save works, and clears what the crash left.
        lissom.save(old, parent / "net", overwrite=True)
        assert [p.name for p in parent.iterdir()] == ["net"]
        if not seen["dead"]:
            break
    else:
        pytest.fail(f"the save never came through: {seen['steps']}")
    assert outcomes == sorted(outcomes, reverse=True)  # old … old new … new
    assert set(outcomes) == {"old", "new"}
    assert k > 8


def test_an_exception_while_writing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = two_nets()
    folder = lissom.save(old, tmp_path / "net")
    before = tree(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        lissom.save(new, folder, overwrite=True)
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_save_that_is_still_running_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    old, new = two_nets()
    with _atomic.replace_folder(tmp_path / "net") as running:
        lissom.save(old, tmp_path / "net")
        assert running.is_dir()
        lissom.save(new, running / "inner")
    assert torch.equal(lissom.load(tmp_path / "net" / "inner").qweight, new.qweight)


def test_exchange_is_used_here_or_said_not_to_be(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not _atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    assert (tmp_path / "a" / "b").read_text() == "b"
    with pytest.raises(OSError, match="No such file"):
        _atomic._exchange(tmp_path / "a", tmp_path / "none")


# ---------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def tiny(transformers: Any, name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **TINY)
        return transformers.BertModel(config).eval()
    if name == "bert-no-pooler":
        config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **TINY)
        return transformers.BertModel(config, add_pooling_layer=False).eval()
    if name == "bert-mlm":
        config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **TINY)
        return transformers.BertForMaskedLM(config).eval()
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=2, vocab_size=60, n_positions=32, bos_token_id=1, eos_token_id=1
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=60, num_key_value_heads=2, bos_token_id=1, eos_token_id=1, **TINY
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("name", ["bert", "bert-no-pooler", "bert-mlm", "gpt2", "llama"])
def test_hugging_face_models_need_only_the_folder(transformers: Any, tmp_path: Path, name: str) -> None:
    model = tiny(transformers, name)
    inputs = {"input_ids": ids() % 50, "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    lissom.compress_(model, lissom.Int8(prefer="size"), example_inputs=inputs)
    folder = lissom.save(model, tmp_path / "m")
    state = torch.get_rng_state()
    loaded = lissom.load(folder)
    assert torch.equal(state, torch.get_rng_state())
    assert type(loaded) is type(model)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    for (n, a), (m, b) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert (n, a.dtype) == (m, b.dtype)
        assert a.numel() == 0 or torch.equal(a, b)
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in loaded.parameters()]
    if name in ("gpt2", "bert-mlm"):
        assert len({id(t) for n, t in loaded.named_buffers() if t.shape == (60, 32)}) == 1
    again = copy.deepcopy(loaded)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_hugging_face_config_is_checked(transformers: Any, tmp_path: Path) -> None:
    model = tiny(transformers, "bert")
    lissom.compress_(model, lissom.Int8())
    pristine = lissom.save(model, tmp_path / "m")
    spoil: list[tuple[Callable[[Path], Any], str]] = [
        (
            lambda f: edit_json(f, lambda d: d["build"].update({"class": "NoSuchModel"})),
            "'NoSuchModel' is no model",
        ),
        (
            lambda f: edit_json(f, lambda d: d["build"].update({"class": "pipeline"})),
            "'pipeline' is no model",
        ),
        (lambda f: edit_json(f, lambda d: d["build"].update({"class": "BertConfig"})), "is no model"),
        (
            lambda f: edit_json(f, lambda d: d["build"].update({"class": "PreTrainedModel"})),
            "PreTrainedModel",
        ),
        (lambda f: edit_json(f, lambda d: d["build"].update({"class": None})), "is no model"),
        (
            lambda f: edit_json(f, lambda d: d["build"].update({"class": "BertForMaskedLM"})),
            "does not exist in the given Bert",
        ),
        (lambda f: edit_json(f, lambda d: d["build"].update(absent=["no.such"])), "'no.such' is no module"),
        (lambda f: edit_json(f, lambda d: d["build"].update(absent=7)), "absent=7 is not a list"),
        (lambda f: (f / "config.json").unlink(), "config.json: the file is missing"),
        (lambda f: edit_config(f, hidden_size="many"), "config.json: no BertModel can be made"),
        (lambda f: edit_config(f, hidden_size=64), "but the model has"),
        (lambda f: edit_config(f, num_hidden_layers=1), "does not exist in the given BertModel"),
        (lambda f: edit_config(f, hidden_size=10**12), "config.json: no BertModel can be made"),
    ]
    for i, (change, part) in enumerate(spoil):
        folder = Path(shutil.copytree(pristine, tmp_path / str(i)))
        change(folder)
        with pytest.raises(lissom.FormatError) as raised:
            lissom.load(folder)
        assert part in str(raised.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    fix_checksum(folder, "config.json")


def test_code_that_a_config_points_to_is_not_loaded(transformers: Any, tmp_path: Path) -> None:
    model = tiny(transformers, "bert")
    folder = lissom.save(model, tmp_path / "m")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(folder, auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})
    assert type(lissom.load(folder)) is type(model)


def test_from_pretrained_does_not_fill_in_random_weights_silently(transformers: Any, tmp_path: Path) -> None:
    model = tiny(transformers, "bert")
    lissom.compress_(model, lissom.Int8())
    folder = lissom.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="quant_method"):
        transformers.AutoModel.from_pretrained(folder)


def test_a_subclass_of_the_users_own_is_not_rebuilt_as_something_else(
    transformers: Any, tmp_path: Path
) -> None:
    class Mine(transformers.BertModel):
        pass

    folder = lissom.save(Mine(tiny(transformers, "bert").config), tmp_path / "m")
    with pytest.raises(lissom.FormatError, match=r"Mine, whose code is not in the file"):
        lissom.load(folder)


def test_parameters_of_other_threads_are_left_alone_while_a_model_is_built(transformers: Any) -> None:
    import threading

    from lissom.integrations.transformers import _parameters_on_meta

    made: list[nn.Linear] = []
    with _parameters_on_meta():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not made[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    assert not torch.nn.modules.module._global_parameter_registration_hooks
