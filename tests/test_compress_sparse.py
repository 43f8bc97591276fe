"""``BlockSparse`` in the compressor, in files and on the command line."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lissom
from lissom import BlockSparse, Int4, Int8, compress_, formats
from lissom.compress import calibrate, measure, sparsity
from lissom.compress.measure import PairedTiming, state_bytes
from lissom.nn import FusedActivation, Int4Linear, Int8Embedding, Int8Linear, SparseLinear


def size(sparsity: float = 0.5, **options: Any) -> BlockSparse:
    """Convert whatever can be converted: the clock of a busy machine must not decide a test."""
    return BlockSparse(sparsity, prefer="size", **{"block_shape": (8, 1), **options})


class Net(nn.Module):
    """An embedding, fused activations, a linear under two names, and two that share one weight."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.up = nn.Linear(24, 40)
        self.act = nn.GELU()
        self.down = nn.Linear(40, 24, bias=False)
        self.again = self.up
        self.left = nn.Linear(24, 24)
        self.right = nn.Linear(24, 24)
        self.right.weight = self.left.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for up in (self.up, self.again):
            x = x + self.down(self.act(up(x)))
        return self.left(x) + self.right(x * 2)


def ids(rows: int = 3) -> Tensor:
    return torch.randint(30, (rows, 7), generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def status(report: lissom.Report) -> dict[str, str]:
    return {layer.name: layer.status for layer in report.layers}


def reason(report: lissom.Report, name: str) -> str:
    return next(layer.reason for layer in report.layers if layer.name == name)


def mask_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer, SparseLinear)
    ones = torch.ones_like(layer.sparse.values, dtype=torch.float32)
    w = formats.BlockSparseWeights(
        ones,
        layer.crow_indices,
        layer.col_indices,
        out_features=layer.out_features,
        in_features=layer.in_features,
    )
    return formats.block_sparse_to_dense(w).bool()


@pytest.fixture
def fake_timer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Replaces the clock: entries (before, after) in µs are used up in order, the last one stays."""
    script: list[tuple[float, float]] = [(100.0, 50.0)]
    calls: list[int] = []

    def fake(before: Any, after: Any, **_: Any) -> PairedTiming:
        entry = script[min(len(calls), len(script) - 1)]
        calls.append(1)
        return PairedTiming(*entry, entry[1] / entry[0], 5)

    monkeypatch.setattr(measure, "time_pair", fake)
    return script


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    sparsity._shapes.clear()
    sparsity._densities.clear()


# --- what it does -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("method", ["l1", "l2", "wanda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_converts_linears(dtype: Any, method: Any, scope: Any, with_inputs: bool) -> None:
    model = Net()
    dense = copy.deepcopy(model)
    example = ids() if with_inputs else None
    calibration = None if with_inputs or method != "wanda" else [ids()]
    config = size(0.5, dtype=dtype, method=method, scope=scope)
    report = compress_(model, config, example_inputs=example, calibration=calibration, strict=True)
    assert status(report) == {
        "embed": "skipped",
        **dict.fromkeys(("up", "down", "left", "right"), "converted"),
    }
    assert reason(report, "embed") == "BlockSparse is for linear layers"
    assert "density 0." in reason(report, "up") + reason(report, "down")
    assert isinstance(model.act, FusedActivation) is with_inputs
    assert model.again is model.up
    kept = total = 0
    for name in ("up", "down", "left"):
        layer, original = getattr(model, name), getattr(dense, name)
        assert isinstance(layer, SparseLinear)
        mask = mask_of(layer)
        kept, total = kept + int(mask.sum()), total + mask.numel()
        if scope == "uniform":
            assert layer.density == pytest.approx(0.5, abs=0.02)
        tolerance = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.004}[dtype] * float(
            original.weight.detach().abs().amax()
        )
        error = (layer.to_dense(torch.float32) - original.weight * mask).detach().abs()
        assert float(error.amax()) <= tolerance
        x = torch.randn(4, layer.in_features)
        y = F.linear(x, layer.to_dense(torch.float32), layer.bias)
        y = F.gelu(y) if layer.act_fn else y
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0.05 if dtype == "int8" else 1e-5)
    assert kept / total == pytest.approx(0.5, abs=0.02)
    assert report.bytes_after == state_bytes(model) < report.bytes_before
    if with_inputs:
        rows = {layer.name: layer for layer in report.layers}
        assert rows["up"].act_fn == "gelu"
        assert rows["up"].backend
        assert rows["up"].sqnr_db is not None
        assert report.cosine is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_models(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    x = torch.randn(5, 32).to(dtype)
    report = compress_(model, size(0.7), example_inputs=x, strict=True)
    assert model(x).dtype == dtype
    assert model[0].weight.dtype == dtype
    assert model[0].values.dtype == torch.float32
    assert report.cosine is not None
    assert report.cosine > 0.2


def test_a_float16_model_in_float16_values() -> None:
    model = mlp().half()
    x = torch.randn(5, 32).half()
    expected, total = copy.deepcopy(model), state_bytes(model)
    report = compress_(model, size(0.7, dtype="float16"), example_inputs=x, strict=True)
    for i in (0, 2):
        assert model[i].values.dtype == torch.float16
        dense = model[i].to_dense().detach()
        assert torch.equal(dense, expected[i].weight * mask_of(model[i]))
    assert model(x).dtype == torch.float16
    assert report.bytes_after < 0.6 * total


def test_weights_beyond_float16_are_left_alone() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = -7e4
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="its weight holds -70000, and float16"):
        compress_(model, size(dtype="float16"), strict=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = compress_(model, size(dtype="float16"))
    assert reason(report, "2").startswith("its weight holds -70000, and float16 values must be finite")
    assert status(report)["0"] == "converted"


def test_patterns_give_sparsity_per_layer_and_mix_with_the_others() -> None:
    model = Net()
    recipe = {
        "up": size(0.25),
        "again": size(0.25),
        "down": size(0.75, block_shape=(4, 4)),
        "embed": Int8(prefer="size"),
        "*": None,
    }
    compress_(model, recipe, example_inputs=ids())
    assert (model.up.density, model.down.density) == (0.75, 0.25)
    assert type(model.embed) is Int8Embedding
    assert type(model.left) is nn.Linear
    model = mlp()
    compress_(model, {"0": size(), "2": Int4(prefer="size")}, example_inputs=torch.randn(4, 32))
    assert [type(m) for m in model] == [SparseLinear, FusedActivation, Int4Linear]


def test_uniform_is_what_from_linear_does() -> None:
    model = mlp()
    expected = SparseLinear.from_linear(model[0], size(0.7))
    compress_(model, size(0.7))
    assert torch.equal(model[0].to_dense(), expected.to_dense())


def test_global_takes_more_where_the_weight_is_in_few_blocks() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10))
    with torch.no_grad():
        model[1].weight.pow_(5)
    weights = [m.weight.detach().clone() for m in model]
    compress_(model, size(0.5, scope="global", block_shape=(1, 1)))
    kept = sum(int(mask_of(m).sum()) for m in model)
    total = sum(w.numel() for w in weights)
    assert kept == total - total // 2
    for layer, weight in zip(model, weights, strict=True):
        dropped = weight.abs()[~mask_of(layer)]
        assert dropped.numel() == 0 or float(dropped.max()) <= float(layer.values.detach().abs().min())
    assert model[1].density < 0.4 < 0.6 < model[0].density


def test_global_is_per_config() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[3].weight.zero_()
    one, two = size(0.5, scope="global"), size(0.75, scope="global")
    compress_(model, {"[01]": one, "*": two})
    densities = [m.density for m in model]
    assert sum(densities[:2]) / 2 == pytest.approx(0.5, abs=0.01)
    assert sum(densities[2:]) / 2 == pytest.approx(0.25, abs=0.01)
    assert densities[3] == 0, "a layer without weight loses everything"
    x = torch.randn(3, 32)
    assert torch.equal(model[3](x), model[3].bias.expand(3, 32))


# --- Wanda --------------------------------------------------------------------------------------------------


def test_wanda_sees_all_batches_once() -> None:
    model = mlp()
    batches = [torch.randn(5, 3, 32) * torch.linspace(0.01, 3, 32) for _ in range(4)]
    dense = copy.deepcopy(model)
    report = compress_(model, size(0.5, method="wanda"), calibration=iter(batches))
    norm = torch.cat([b.view(-1, 32) for b in batches]).norm(dim=0)
    expected = SparseLinear.from_linear(dense[0], size(0.5, method="wanda"), activation_norm=norm)
    assert torch.equal(model[0].to_dense(), expected.to_dense())
    hidden = torch.relu(dense[0](torch.cat(batches))).reshape(-1, 64).detach()
    expected = SparseLinear.from_linear(
        dense[2], size(0.5, method="wanda"), activation_norm=hidden.norm(dim=0)
    )
    assert torch.equal(model[2].to_dense(), expected.to_dense())
    assert set(status(report).values()) == {"converted"}


def test_wanda_is_closer_than_magnitude_where_inputs_differ() -> None:
    torch.manual_seed(0)
    model = mlp()
    x = torch.randn(64, 32) * torch.logspace(-2, 1, 32)
    errors = {}
    for method in ("l2", "wanda"):
        pruned = copy.deepcopy(model)
        compress_(pruned, size(0.5, method=method), calibration=[x])
        errors[method] = float((pruned(x) - model(x)).detach().norm())
    assert errors["wanda"] < 0.7 * errors["l2"]


def test_wanda_and_static_ranges_come_from_one_pass() -> None:
    seen = []

    def batches() -> Iterator[Tensor]:
        for i in range(3):
            seen.append(i)
            yield torch.randn(4, 32)

    model = mlp()
    recipe = {"0": size(method="wanda"), "2": Int8(activation="static", prefer="size")}
    compress_(model, recipe, calibration=batches())
    assert seen == [0, 1, 2]
    assert [type(m) for m in model] == [SparseLinear, nn.ReLU, Int8Linear]


def test_norms_are_per_row() -> None:
    one, two = calibrate.SquareSum(), calibrate.SquareSum()
    x = torch.randn(6, 4).half()
    one.update(x)
    two.update(x.view(2, 3, 4))
    two.update(x)
    torch.testing.assert_close(one.norm(), two.norm())
    torch.testing.assert_close(one.norm(), x.double().square().mean(0).sqrt())


def test_wanda_needs_data() -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"method='wanda' \(layer '0'\) needs sample data; give calibration="
    ):
        compress_(model, size(method="wanda"))
    bad = torch.zeros(4, 32)
    bad[1, 2] = bad[1, 3] = float("nan")
    with pytest.raises(ValueError, match=r"calibration: the input of layer '0' is unusable: 2 of 128 values"):
        compress_(model, size(method="wanda"), calibration=[bad])
    assert type(model[0]) is nn.Linear
    report = compress_(model, size(method="wanda"), calibration=[torch.zeros(4, 32)])
    assert reason(report, "0") == "its input was all zeros in calibration, so its weights cannot be compared"


def test_wanda_layers_that_no_batch_reaches_stay_dense() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    report = compress_(Branch(), size(method="wanda"), calibration=[torch.randn(3, 8)])
    assert status(report) == {"a": "converted", "b": "kept dense"}
    assert "no calibration batch reached it, so the norms of its inputs are unknown" in reason(report, "b")


# --- the block shape ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (8, 1)), ("bfloat16", (8, 1)), ("int8", (8, 4))])
def test_auto_without_inputs(dtype: Any, shape: Any) -> None:
    model = mlp()
    compress_(model, size(dtype=dtype, block_shape="auto"))
    assert model[0].block_shape == model[2].block_shape == shape


@pytest.mark.parametrize(
    ("times", "shape"),
    [
        ((100, 100, 100, 100, 100, 100, 100, 100), (8, 1)),
        ((100, 99, 98, 97, 96, 100, 100, 100), (8, 1)),
        ((100, 90, 80, 70, 69, 68, 67, 66.9), (8, 4)),
        ((100, 90, 80, 70, 60, 50, 40, 30), (64, 64)),
        ((100, 50, 20, 21, 20, 20, 20, 20), (4, 4)),
    ],
)
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_auto_takes_the_smallest_of_the_fast(
    times: Any, shape: Any, scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(functions: Any, device: str = "cpu", rounds: int = 5) -> list[float]:
        asked.append([function() for function in functions])
        return list(times)

    monkeypatch.setattr(measure, "time_each", fake)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128))
    report = compress_(model, size(block_shape="auto", scope=scope), example_inputs=torch.randn(6, 64))
    assert [m.block_shape for m in model] == [shape] * 3
    assert report.layers[0].config is not None
    assert tuple(report.layers[0].config["block_shape"]) == shape
    assert len(asked) == 2, "the same shape is timed once"
    assert {y.shape for y in asked[0]} == {(6, 64)}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_auto_on_the_real_clock(dtype: Any) -> None:
    model = mlp()
    compress_(model, size(0.9, block_shape="auto", dtype=dtype), example_inputs=torch.randn(6, 32))
    assert model[0].block_shape in sparsity.FAST_BLOCK_SHAPES


def test_time_each_measures() -> None:
    slow, fast = measure.time_each([lambda: sum(range(20000)), lambda: None], rounds=3)
    assert slow > fast > 0


# --- do no harm ---------------------------------------------------------------------------------------------


def test_not_faster_says_where_it_would_be(fake_timer: list[tuple[float, float]]) -> None:
    # The layer itself; then: the least density wins, 0.255 wins, 0.3775 does not, 0.31, 0.34 and 0.36 do.
    fake_timer[:] = [(10.0, 12.0), *[(10.0, 10.0 * r) for r in (0.1, 0.8, 1.1, 0.9, 0.9, 0.99)]]
    model = nn.Sequential(nn.Linear(32, 64))
    report = compress_(model, BlockSparse(0.5, (8, 1)), example_inputs=torch.randn(6, 32))
    assert type(model[0]) is nn.Linear
    assert reason(report, "0") == (
        "not faster: 0.83× the dense speed at M=6 and density 0.50; it would win below density ≈ 0.36"
    )


def test_not_faster_at_any_density(fake_timer: list[tuple[float, float]]) -> None:
    fake_timer[:] = [(10.0, 20.0)]
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))
    report = compress_(model, BlockSparse(0.0, (4, 4)), example_inputs=torch.randn(6, 32))
    for name in ("0", "1"):
        assert reason(report, name) == (
            "not faster: 0.50× the dense speed at M=6 and density 1.00; 4×4 blocks would not win at any "
            "density"
        )


def test_size_first_wants_it_smaller_at_least(fake_timer: list[tuple[float, float]]) -> None:
    fake_timer[:] = [(10.0, 20.0)]
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 64, bias=False))
    report = compress_(model, {"0": size(0.0), "1": size(0.2)}, example_inputs=torch.randn(6, 32))
    assert status(report) == {"0": "kept dense", "1": "converted"}
    assert reason(report, "0") == (
        "neither smaller (1.13× the bytes at density 1.00) nor faster (0.50× the dense speed at M=6)"
    )
    assert reason(report, "1").startswith("smaller (prefer='size'), 0.50× the dense speed, density 0.80")


def test_densities_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    monkeypatch.setattr(
        measure, "time_pair", lambda *_, **__: times.append(1) or PairedTiming(10.0, 20.0, 2.0, 5)
    )
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    compress_(model, BlockSparse(0.5, (8, 1)), example_inputs=torch.randn(6, 64))
    assert len(times) == 2  # one for the layers, one for the least density


def test_strict_names_them(fake_timer: list[tuple[float, float]]) -> None:
    fake_timer[:] = [(10.0, 20.0)]
    model = mlp()
    with pytest.raises(
        ValueError, match=r"strict=True, but 2 (.|\n)*0: kept dense: not faster(.|\n)*2: kept dense"
    ):
        compress_(model, BlockSparse(0.5, (8, 1)), example_inputs=torch.randn(6, 32), strict=True)
    assert type(model[0]) is nn.Linear


def test_faster_is_kept(fake_timer: list[tuple[float, float]]) -> None:
    fake_timer[:] = [(30.0, 10.0)]
    model = mlp()
    report = compress_(model, BlockSparse(0.5, (8, 1)), example_inputs=torch.randn(6, 32))
    assert reason(report, "0") == "3.00× as fast, density 0.50 in 8×1 blocks, relu fused"
    assert "block_sparse" in str(report)


def test_layers_of_one_shape_with_other_densities_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    monkeypatch.setattr(
        measure, "time_pair", lambda *_, **__: times.append(1) or PairedTiming(10.0, 5.0, 0.5, 5)
    )
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight.pow_(3)
    compress_(model, size(scope="global"), example_inputs=torch.randn(6, 64))
    assert model[0].density != model[1].density
    assert len(times) == 3  # each, and the whole model


# --- tied and shared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"method": "wanda"}, {"scope": "global"}, {"block_shape": "auto"}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_two_linears_with_one_weight_stay_tied(dtype: Any, options: dict[str, Any]) -> None:
    model = Net()
    report = compress_(model, size(dtype=dtype, **options), example_inputs=ids())
    for m in (model, copy.deepcopy(model)):
        for name in ("values", "crow_indices", "col_indices", "weight_scale"):
            assert getattr(m.left, name) is getattr(m.right, name)
        assert m.left.bias is not m.right.bias
        m(ids())
    rows = {layer.name: layer for layer in report.layers}
    assert rows["right"].shared_with == ("left",)
    assert rows["right"].bytes_after == 24 * 4, "the bias alone"
    assert report.bytes_after == state_bytes(model)


def test_tied_linears_train_together() -> None:
    model = Net()
    compress_(model, size(), example_inputs=ids())
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        steps.zero_grad()
        loss = model(ids()).square().mean()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.left.values is model.right.values


def test_a_linear_tied_to_an_embedding_is_left_alone() -> None:
    model = nn.Module()
    model.embed = nn.Embedding(30, 8)
    model.head = nn.Linear(8, 30, bias=False)
    model.other = nn.Linear(8, 8)
    model.head.weight = model.embed.weight
    report = compress_(model, size())
    assert status(report) == {"embed": "skipped", "head": "skipped", "other": "converted"}
    assert "tied to embed, which is left alone (BlockSparse is for linear layers)" in reason(report, "head")
    report = compress_(model, {"embed": Int8(prefer="size"), "*": size()})
    assert "tied to embed in another form" in reason(report, "head")
    assert model.head.weight is model.embed.weight


def test_tied_linears_with_different_configs_are_left_alone() -> None:
    model = Net()
    report = compress_(model, {"left": size(0.5), "right": size(0.6), "*": None}, example_inputs=ids())
    assert reason(report, "left") == "its weight is tied to right in another form; they stay tied"
    assert model.left.weight is model.right.weight


# --- explain, report, progress ------------------------------------------------------------------------------


def test_explain() -> None:
    model = mlp()
    compress_(model, size(), example_inputs=torch.randn(4, 32))
    first = lissom.explain(model).layers[0]
    assert first.type == "SparseLinear"
    assert "density 0.50 in 8×1 blocks" in first.reason
    assert first.bytes_dense == 64 * 32 * 4 + 64 * 4
    assert first.bytes_now < 0.7 * first.bytes_dense
    by_hand = nn.Sequential(SparseLinear.from_linear(nn.Linear(32, 64), BlockSparse(0.75, (16, 4))))
    assert lissom.explain(by_hand).layers[0].reason == "density 0.25 in 16×4 blocks"


def test_a_second_call_leaves_sparse_layers_alone() -> None:
    model = mlp()
    compress_(model, {"0": size(), "*": None})
    layer = model[0]
    report = compress_(model, Int8(prefer="size"), example_inputs=torch.randn(4, 32))
    assert model[0] is layer
    assert reason(report, "0") == "already compressed (SparseLinear)"
    assert type(model[2]) is Int8Linear


def test_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    compress_(
        mlp(),
        size(method="wanda"),
        example_inputs=torch.randn(4, 32),
        progress=lambda stage, done, total, name: seen.append((stage, done, total)),
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["select", "trace", "calibrate", "prune", "measure", "quantize", "compare"]
    assert ("prune", 2, 2) in seen


def test_int8_has_a_limit_on_k() -> None:
    model = nn.Sequential(nn.Linear(133153, 1, bias=False))
    report = compress_(model, size(dtype="int8"))
    assert "in_features=133153 could overflow" in reason(report, "0")
    assert "dtype='float32', 'bfloat16' or 'float16' has no limit" in reason(report, "0")


def test_weights_that_are_not_finite_are_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layer '2': NaN or infinity in the weights"):
        compress_(model, size())


def test_transposed_weights_of_hugging_face() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(24, 16))
    weight = model[0].weight.detach().clone()
    compress_(model, size(), example_inputs=torch.randn(3, 16), strict=True)
    assert (model[0].in_features, model[0].out_features) == (16, 24)
    assert torch.equal(model[0].to_dense(), weight.t() * mask_of(model[0]))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_hugging_face_models_need_only_the_folder(tmp_path: Path, dtype: Any) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30, **settings)).eval()
    compress_(model, size(dtype=dtype), example_inputs=ids(), strict=True)
    back = lissom.load(lissom.save(model, tmp_path / "bert"))
    assert isinstance(back.encoder.layer[0].output.dense, SparseLinear)
    assert torch.equal(back(ids()).last_hidden_state, model(ids()).last_hidden_state)


# --- files --------------------------------------------------------------------------------------------------

RECIPES: dict[str, Any] = {
    "float32": size(0.75),  # half of a bfloat16 weight's values would take no less in float32, and be timed
    "bfloat16": size(dtype="bfloat16", block_shape=(4, 4)),
    "float16": size(dtype="float16", block_shape=(3, 5)),
    "int8": size(dtype="int8"),
    "int8 quads": size(dtype="int8", block_shape=(8, 4)),
    "mixed": {"up": size(0.9), "again": size(0.9), "embed": Int8(prefer="size"), "*": Int4(prefer="size")},
}


def compressed(recipe: Any, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    net = Net(dtype).eval()
    compress_(net, recipe, example_inputs=ids())
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip_is_bit_identical(tmp_path: Path, recipe: str, dtype: torch.dtype) -> None:
    net = compressed(RECIPES[recipe], dtype)
    net.down.requires_grad_(False)
    folder = lissom.save(net, tmp_path / "net")
    back = lissom.load(folder, Net())
    assert repr(back) == repr(net)
    assert torch.equal(back(ids()), net(ids()))
    state, old = back.state_dict(), net.state_dict()
    assert state.keys() == old.keys()
    for name, tensor in old.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    assert {name: p.requires_grad for name, p in back.named_parameters()} == flags
    assert back.again is back.up
    assert back.up.weight.dtype == net.up.weight.dtype
    if recipe != "mixed":
        assert back.left.values is back.right.values
        assert back.left.col_indices is back.right.col_indices


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_a_single_layer_needs_no_model(tmp_path: Path, values: Any) -> None:
    layer = SparseLinear.from_linear(nn.Linear(21, 19), BlockSparse(0.5, (8, 4), dtype=values), act_fn="silu")
    back = lissom.load(lissom.save(layer, tmp_path / "layer", example_inputs=torch.randn(2, 21)))
    x = torch.randn(3, 21)
    assert repr(back) == repr(layer)
    assert torch.equal(back(x), layer(x))


def test_trained_after_loading(tmp_path: Path) -> None:
    back = lissom.load(lissom.save(compressed(size()), tmp_path / "net"), Net())
    before = back(ids()).square().mean()
    steps = torch.optim.AdamW(back.parameters(), lr=1e-2)
    before.backward()
    steps.step()
    assert float(back(ids()).detach().square().mean()) < float(before.detach())


def test_inspect(tmp_path: Path) -> None:
    net = compressed(size(0.75))
    summary = lissom.io.inspect(lissom.save(net, tmp_path / "net"))
    entry = summary["layers"]["up"]
    assert entry["class"] == "SparseLinear"
    assert entry["args"] == {
        "in_features": 24,
        "out_features": 40,
        "bias": True,
        "block_shape": [8, 1],
        "blocks": 30,
        "act_fn": "gelu",
        "dtype": "float32",
        "floating_dtype": "float32",
    }
    assert entry["bytes"] == 30 * 8 * 4 + 30 * 4 + 6 * 4 + 40 * 4
    assert summary["parameters"] == sum(p.numel() for p in net.parameters())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(21, 19), nn.Linear(19, 16)).eval()
    compress_(
        net, {"0": size(block_shape=(8, 4)), "1": size(dtype="int8")}, example_inputs=torch.randn(4, 21)
    )
    return lissom.save(net, tmp_path_factory.mktemp("pristine") / "net")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A saved model that the test may spoil."""
    import shutil

    return Path(shutil.copytree(pristine, tmp_path / "net"))


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(21, 19), nn.Linear(19, 16))


def refused(folder: Path, *parts: str) -> None:
    """Loading raises a FormatError that holds ``parts`` on one line, and leaves the given model as it was."""
    model = dense()
    before = {name: (id(t), t.clone()) for name, t in model.named_parameters()}
    for act in (lambda: lissom.load(folder, model, check=False), lambda: lissom.io.inspect(folder)):
        with pytest.raises(lissom.FormatError) as raised:
            act()
        for part in (*parts, "the folder was altered, copy it again"):
            assert part in str(raised.value), str(raised.value)
        assert "\n" not in str(raised.value)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    for name, tensor in model.named_parameters():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors and keep size and checksum right, as someone who alters a file on purpose would."""
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    content = path.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_json(folder, lambda data: data["files"].update({path.name: entry}))


def edit_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "lissom.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_the_folder_is_sound_as_long_as_nobody_touches_it(folder: Path) -> None:
    edit_tensors(folder, lambda t: None)
    lissom.load(folder, dense())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda t: t["0.col_indices"].__setitem__(3, 1 << 30),
            ("'0'", "col_indices[3] is 1073741824; use 0 to 5"),
        ),
        (lambda t: t["0.col_indices"].__setitem__(0, -1), ("'0'", "col_indices[0] is -1")),
        (lambda t: t["1.col_indices"].__setitem__(0, 19), ("'1'", "col_indices[0] is 19; use 0 to 18")),
        (
            lambda t: t["0.col_indices"].__setitem__(slice(0, 2), t["0.col_indices"][[1, 0]].clone()),
            ("'0'", "col_indices[1] is", "they must increase"),
        ),
        (
            lambda t: t["0.col_indices"].__setitem__(1, int(t["0.col_indices"][0])),
            ("'0'", "they must increase"),
        ),
        (lambda t: t["0.crow_indices"].__setitem__(1, 1 << 30), ("'0'", "crow_indices[2] is")),
        (lambda t: t["0.crow_indices"].__setitem__(0, -5), ("'0'", "crow_indices[0] is -5; it must be 0")),
        (lambda t: t["0.crow_indices"].__setitem__(-1, 100), ("'0'", "crow_indices[3] is 100")),
        (lambda t: t["0.values"].__setitem__((-1, -1, 0), 1.0), ("'0'", "past N=19")),
        (lambda t: t["1.values"].__setitem__((0, 0, 0), -128), ("'1'", "is -128")),
        (lambda t: t["1.weight_scale"].__setitem__(2, float("nan")), ("'1'", "weight_scale[2] is nan")),
        (
            lambda t: t.update({"0.values": t["0.values"][:-1].clone()}),
            ("'0.values' is float32", "says float32"),
        ),
        (lambda t: t.update({"0.col_indices": t["0.col_indices"].long()}), ("'0.col_indices' is int64",)),
        (lambda t: t.pop("0.crow_indices"), ("the tensor '0.crow_indices' is missing",)),
        (lambda t: t.pop("1.weight_scale"), ("the tensor '1.weight_scale' is missing",)),
    ],
)
def test_altered_tensors(folder: Path, change: Callable[[Any], Any], parts: tuple[str, ...]) -> None:
    edit_tensors(folder, change)
    refused(folder, *parts)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("block_shape", [8, 0], "block_shape=[8, 0] is not valid"),
        ("block_shape", [8], "block_shape=[8] is not valid"),
        ("block_shape", "auto", "block_shape='auto' is not valid"),
        ("block_shape", [4, 8], "layers['0']: SparseLinear: blocks="),
        ("block_shape", [4, 4], "'0.values' is float32 [9, 8, 4], but lissom.json says float32 [9, 4, 4]"),
        ("blocks", -1, "blocks=-1 is not valid"),
        ("blocks", True, "blocks=True is not valid"),
        ("blocks", 8, "'0.values' is float32 [9, 8, 4], but lissom.json says float32 [8, 8, 4]"),
        ("blocks", 1 << 39, "layers['0']: SparseLinear: blocks=549755813888 cannot be"),
        ("dtype", "float64", "dtype='float64' is not valid"),
        ("dtype", "bfloat16", "'0.values' is float32"),
        ("dtype", "float16", "'0.values' is float32"),
        ("dtype", "int8", "'0.values' is float32 [9, 8, 4], but lissom.json says int8"),
        ("floating_dtype", "int8", "floating_dtype='int8' is not valid"),
        ("act_fn", "tanh", "act_fn='tanh' is unknown"),
        ("in_features", 1 << 39, "'0.values'"),
    ],
)
def test_altered_entry(folder: Path, key: str, value: Any, part: str) -> None:
    edit_json(folder, lambda data: data["layers"]["0"]["args"].update({key: value}))
    if (key, value) == ("block_shape", [4, 8]):
        edit_json(folder, lambda data: data["layers"]["0"]["args"].update({"blocks": 99}))
    if key == "in_features":
        edit_json(folder, lambda data: data["layers"]["0"]["args"].update({"block_shape": [8, 1]}))
    refused(folder, part)


# --- the command line ---------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sparseshop.py").write_text(FACTORY)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sparseshop", raising=False)
    return tmp_path


def command(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from lissom import cli

    capfd.readouterr()
    code = cli.main(list(arguments))
    captured = capfd.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_command_line(shop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (shop / "mine.yaml").write_text(
        "modules:\n  '0': {kind: block_sparse, sparsity: 0.9, block_shape: [16, 4], prefer: size}\n"
        "  '*': {kind: block_sparse, dtype: int8, method: wanda, scope: global, prefer: size}\n"
    )
    arguments = (
        "compress",
        "sparseshop:build",
        "--weights",
        "weights.safetensors",
        "--example-shape",
        "8x256",
    )
    for recipe in ("sparse-size", "mine.yaml"):
        out = command(capfd, *arguments, "--recipe", recipe, "--out", recipe + ".out")
        assert "converted" in out
        loaded = lissom.load(
            shop / (recipe + ".out"), nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        )
        assert isinstance(loaded[0], SparseLinear)
        out = command(capfd, "inspect", recipe + ".out")
        for text in ('"kind": "block_sparse"', "512×256", "block_sparse "):
            assert text in out
    assert loaded[0].block_shape == (16, 4)
    assert loaded[0].density == pytest.approx(0.1, abs=0.01)
    assert loaded[2].values.dtype == torch.int8
    entry = json.loads(command(capfd, "inspect", "mine.yaml.out", "--json"))["layers"]["0"]
    assert (entry["class"], entry["args"]["block_shape"]) == ("SparseLinear", [16, 4])
