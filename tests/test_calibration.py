"""Static activation ranges: each method against a brute-force computation on the raw values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lissom
from lissom import Int8, compress_
from lissom.compress.calibrate import (
    BINS,
    Histogram,
    absmax_clip,
    clip_for,
    entropy_clip,
    mse_clip,
    percentile_clip,
)
from lissom.formats import rotate
from lissom.nn import Int8Linear

ONE_BIN = 2.0 / BINS
"""At least half of the bins are in use, so a bin is at most this share of the largest magnitude."""

MSE_SLACK = 1.03
"""The histogram's choice may cost 3 % more squared error than the best of a fine search on raw values."""


def distributions() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(20000, generator=generator)
    outliers = normal.clone()
    outliers[::4000] = torch.tensor([30.0, -25.0, 28.0, -31.0, 29.0])
    return {
        "normal": normal,
        "uniform": torch.rand(20000, generator=generator) * 2 - 1,
        "relu": normal.relu(),
        "outliers": outliers,
        "tiny": normal * 1e-6,
        "huge": normal * 1e6,
    }


DISTRIBUTIONS = distributions()


def filled(values: Tensor, batches: int = 7) -> Histogram:
    histogram = Histogram()
    for batch in values.chunk(batches):
        histogram.update(batch)
    return histogram


def int8_error(x: Tensor, clip: float) -> float:
    """Mean squared error of static int8 quantization, straight from its definition."""
    scale = clip / 127
    return float((x - torch.round((x / scale).clamp(-127, 127)) * scale).double().square().mean())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_histogram_counts_every_value(name: str) -> None:
    x = DISTRIBUTIONS[name]
    histogram = filled(x)
    magnitude = x.abs()
    assert histogram.absmax == absmax_clip(histogram) == float(magnitude.max())
    assert histogram.zeros == int((x == 0).sum())
    assert int(histogram.counts.sum()) == x.numel() - histogram.zeros
    assert histogram.total == x.numel()
    assert histogram.width <= ONE_BIN * histogram.absmax
    edges = torch.arange(1, BINS) * histogram.width
    brute = torch.searchsorted(magnitude[magnitude > 0].sort().values, edges)  # how many are smaller
    # a value within rounding of an edge may fall on either side
    assert (histogram.counts.cumsum(0)[:-1] - brute).abs().max() <= 2


def test_histogram_does_not_depend_on_the_order() -> None:
    x = DISTRIBUTIONS["outliers"]
    ascending = filled(x[x.abs().argsort()], batches=50)
    descending = filled(x[x.abs().argsort(descending=True)], batches=50)
    assert ascending.absmax == descending.absmax
    assert ascending.width == descending.width
    assert torch.equal(ascending.counts, descending.counts)


def test_histogram_widens_from_far_below() -> None:
    histogram = Histogram()
    histogram.update(torch.tensor([1e-20, 1e-19]))
    histogram.update(torch.tensor([0.75]))
    assert histogram.counts[0] == 2
    assert histogram.counts.sum() == 3
    assert histogram.width == 1.0 / BINS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_histogram_takes_half_precision_and_any_shape(dtype: torch.dtype) -> None:
    histogram = Histogram()
    x = torch.randn(2, 3, 5).to(dtype)
    histogram.update(x.transpose(0, 2))
    histogram.update(x[:0])
    assert histogram.total == 30
    assert histogram.absmax == float(x.abs().max())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_histogram_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="1 of 3 values are NaN or infinite"):
        Histogram().update(torch.tensor([1.0, value, 2.0]))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile(name: str, percentile: float) -> None:
    x = DISTRIBUTIONS[name]
    histogram = filled(x)
    brute = float(x.abs().sort().values[math.ceil(percentile / 100 * x.numel()) - 1])
    clip = percentile_clip(histogram, percentile)
    assert brute - 1e-6 * brute <= clip <= brute + 1.01 * histogram.width


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse(name: str) -> None:
    x = DISTRIBUTIONS[name]
    absmax = float(x.abs().max())
    brute = min(int8_error(x, absmax * i / 500) for i in range(1, 501))
    assert int8_error(x, mse_clip(filled(x))) <= MSE_SLACK * brute


def brute_entropy_clip(x: Tensor, bins: int, width: float) -> float:
    """TensorRT's search, in plain loops over Python lists, on all candidates."""
    counts = [0] * bins
    for value in x.abs().tolist():
        if value > 0:
            counts[min(int(value / width), bins - 1)] += 1
    used = max(i for i, c in enumerate(counts) if c) + 1
    best = (math.inf, 0)
    for i in sorted({*range(128, used, 8), used}):
        p = counts[:i]
        p[-1] += sum(counts[i:])
        q = [0.0] * i
        for level in range(128):
            members = [b for b in range(i) if b * 128 // i == level] if i > 128 else [level] * (level < i)
            held = [b for b in members if counts[b]]
            for b in held:
                q[b] = sum(counts[m] for m in members) / len(held)
        total_p, total_q = sum(p), sum(q)
        if any(a and not b for a, b in zip(p, q, strict=True)):
            continue
        kl = sum(a / total_p * math.log(a / total_p / (b / total_q)) for a, b in zip(p, q, strict=True) if a)
        best = min(best, (kl, i))
    return best[1] * width


@pytest.mark.parametrize("name", ["normal", "relu", "outliers"])
def test_entropy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lissom.compress.calibrate.BINS", 512)  # keeps the loops of the brute force short
    x = DISTRIBUTIONS[name]
    histogram = filled(x)
    brute = brute_entropy_clip(x, 512, histogram.width)
    assert entropy_clip(histogram) == pytest.approx(min(brute, histogram.absmax), rel=1e-6)


@pytest.mark.parametrize("calibration", ["percentile", "mse", "entropy"])
def test_outliers_are_clipped_and_the_bulk_gains(calibration: str) -> None:
    x = DISTRIBUTIONS["outliers"]
    histogram = filled(x)
    clip = clip_for(histogram, Int8(activation="static", calibration=calibration, percentile=99.9))  # type: ignore[arg-type]
    assert clip < histogram.absmax
    bulk = x[x.abs() < 5]
    assert int8_error(bulk, clip) < int8_error(bulk, histogram.absmax)


@pytest.mark.parametrize("calibration", ["absmax", "percentile", "mse", "entropy"])
def test_one_value_is_its_own_range(calibration: str) -> None:
    histogram = filled(torch.full((100,), -3.0))
    clip = clip_for(histogram, Int8(activation="static", calibration=calibration))  # type: ignore[arg-type]
    assert clip == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("calibration", ["absmax", "percentile", "mse", "entropy"])
def test_nothing_but_zeros_has_no_range(calibration: str) -> None:
    config = Int8(activation="static", calibration=calibration)  # type: ignore[arg-type]
    assert clip_for(filled(torch.zeros(50)), config) == 0.0


# --- inside compress_ ---------------------------------------------------------------------------------------


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("calibration", ["absmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("rotation", [True, False])
def test_static_scales_come_from_all_batches(calibration: str, rotation: bool) -> None:
    net = model()
    batches = [torch.randn(64, 16) * factor for factor in (0.1, 1.0, 0.5)]
    config = Int8(activation="static", calibration=calibration, prefer="size", rotation=rotation)  # type: ignore[arg-type]
    seen = torch.cat(batches)
    inputs = filled(rotate(seen, 1 / 16) if rotation else seen, batches=1)
    report = compress_(net, config, calibration=iter(batches))
    layer = net[0]
    assert isinstance(layer, Int8Linear)
    assert layer.input_scale is not None
    # one histogram of all values or three batches of them: the bins are the same
    assert float(layer.input_scale) == pytest.approx(clip_for(inputs, config) / 127, rel=1e-6)
    assert report.layers[0].input_scale == float(layer.input_scale)


def test_example_inputs_stand_in_for_calibration() -> None:
    net = model()
    x = torch.randn(8, 16)
    compress_(net, Int8(activation="static", prefer="size", rotation=False), example_inputs=x)
    assert float(net[0].input_scale) == pytest.approx(float(x.abs().max()) / 127)


def test_layers_that_calibration_never_reaches_or_that_see_only_zeros_stay_dense() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, deep: bool = False) -> Tensor:
            y = self.a(x) + self.b(x * 0)
            return self.c(y) if deep else y

    x = torch.randn(4, 8)
    net = Branches()
    config = Int8(activation="static", prefer="size")
    report = compress_(net, config, example_inputs=(x, True), calibration=[x, (x, False)])
    outcome = {layer.name: (layer.status, layer.reason) for layer in report.layers}
    assert outcome["a"][0] == "converted"
    assert outcome["b"] == (
        "kept dense",
        "its input was all zeros in calibration, so its activation range is unknown",
    )
    assert outcome["c"] == (
        "kept dense",
        "no calibration batch reached it, so its activation range is unknown",
    )


def test_data_loader_as_calibration() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(10, 16))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    report = compress_(
        model(), Int8(activation="static", calibration="mse", prefer="size"), calibration=loader
    )
    assert [layer.status for layer in report.layers] == ["converted", "converted"]


def test_static_named_recipe_runs() -> None:
    x = torch.randn(64, 16)
    net = model()
    expected = net(x)
    lissom.compress_(net, lissom.compress.load_recipe("int8-static"), calibration=[x])
    assert nn.functional.cosine_similarity(net(x).flatten(), expected.flatten(), dim=0) > 0.99
