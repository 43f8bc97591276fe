"""Choosing 4-bit weights without data: ``lissom/choose.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lissom
from lissom import Int4, choose, formats
from lissom.choose import choose_int4
from lissom.testing import DTYPES, assert_same_bits

UNIFORM = [
    Int4(method=method, symmetric=symmetric)  # type: ignore[arg-type]
    for method in ("rtn", "mse", "hqq")
    for symmetric in (False, True)
]
TABLES = [
    *(Int4(codebook="nf4", method=method) for method in ("rtn", "hqq")),  # type: ignore[arg-type]
    *(Int4(codebook="kmeans", codebook_scope=scope) for scope in ("tensor", "channel", "group")),  # type: ignore[arg-type]
    Int4(codebook="kmeans", method="rtn"),
]
ALL = [*UNIFORM, *TABLES]

HALF_ROUNDING = 2.0**-10
"""Relative error that scale and zero-point in float16 leave on a value: 2^-11 each."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of operations on tiny tensors: a second thread only waits, for long where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name(config: Int4) -> str:
    kind = config.codebook or ("symmetric" if config.symmetric else "asymmetric")
    return f"{kind}-{config.codebook_scope or ''}-{config.method}".replace("--", "-")


each = pytest.mark.parametrize("config", ALL, ids=name)


def restored(weight: Tensor, config: Int4, **changes: Any) -> Tensor:
    weights = choose_int4(weight, replace(config, **changes))
    formats.check_int4(weights)
    assert weights.out_features == weight.shape[0]
    assert weights.in_features == weight.shape[1]
    return formats.dequantize_int4(weights)


def error(weight: Tensor, config: Int4, **changes: Any) -> float:
    """Mean squared error over mean square."""
    wrong = restored(weight, config, **changes) - weight.float()
    return float(wrong.square().mean() / weight.float().square().mean())


def gaussian(n: int = 48, k: int = 384, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def uneven(n: int = 96, k: int = 256) -> Tensor:
    """Weights whose columns differ in size, as those of a layer whose inputs differ."""
    sizes = torch.exp(0.7 * torch.randn(k, generator=torch.Generator().manual_seed(3)))
    return gaussian(n, k) * sizes


@each
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_error_of_gaussian_weights(config: Int4, group_size: int) -> None:
    # Lloyd and Max: 16 levels cannot do better than 0.0095 for the whole distribution, evenly spaced ones
    # 0.0115; small groups adapt. Round to nearest keeps the full range.
    limit = 0.03 if config.method == "rtn" else 0.0135
    changes = {"codebook_scope": None} if config.codebook == "nf4" else {}
    assert error(gaussian(), config, group_size=group_size, **changes) < limit


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(config: Int4, dtype: torch.dtype) -> None:
    weight = gaussian(5, 200).to(dtype)
    before = weight.clone()
    weights = choose_int4(weight, config)
    assert_same_bits(weight, before)
    assert weights.weight_scale.shape == (5, 2)
    assert weights.weight_scale.dtype == torch.float16
    assert weights.group_index is None
    if config.codebook is None:
        assert weights.codebook is None
        assert (weights.zero_point is None) == config.symmetric
        if weights.zero_point is not None:
            assert weights.zero_point.dtype == torch.float16
            assert 0 <= float(weights.zero_point.min()) <= float(weights.zero_point.max()) <= 15
    else:
        assert weights.zero_point is None
        shapes: dict[str | None, tuple[int, ...]] = {"tensor": (16,), "channel": (5, 16), "group": (5, 2, 16)}
        assert weights.codebook is not None
        assert weights.codebook.shape == shapes[config.codebook_scope]
    again = choose_int4(weight, config)
    assert_same_bits(again.qweight, weights.qweight)
    assert_same_bits(again.weight_scale, weights.weight_scale)


@each
@pytest.mark.parametrize("rotation", [None, True])
@pytest.mark.parametrize(
    ("n", "k"), [(0, 5), (3, 0), (0, 0), (1, 1), (3, 1), (2, 15), (3, 33), (4, 129), (2, 500)]
)
def test_odd_sizes(config: Int4, rotation: bool | None, n: int, k: int) -> None:
    for group_size in (32, 128, -1):
        changes = {"group_size": group_size, "rotation": rotation}
        got = restored(gaussian(n, k), config, **changes)
        assert got.shape == (n, k)
        assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("config", [c for c in ALL if c.method == "rtn" and c.codebook != "kmeans"], ids=name)
def test_groups_are_chosen_apart(config: Int4) -> None:
    # The short last group included. (Elsewhere a table or the importance of columns joins them.)
    weight = gaussian(6, 300)
    whole = restored(weight, config)
    for begin in (0, 128, 256):
        part = restored(weight[:, begin : begin + 128], config)
        assert_same_bits(whole[:, begin : begin + 128], part)


@each
def test_zeros(config: Int4) -> None:
    weight = gaussian(4, 300)
    weight[1] = 0
    weight[2, 128:256] = 0
    weight[3, 256:] = 0
    got = restored(weight, config)
    for zeros in (got[1], got[2, 128:256], got[3, 256:]):
        assert float(zeros.abs().max()) == 0
    assert float(restored(torch.zeros(3, 40), config, rotation=True).abs().max()) == 0


@each
def test_constant_rows_and_groups(config: Int4) -> None:
    constants = torch.tensor([0.37, -0.021, 5e3, -1e-4])
    got = restored(constants[:, None].repeat(1, 300), config)
    torch.testing.assert_close(got, constants[:, None].repeat(1, 300), rtol=HALF_ROUNDING, atol=0)
    weight = gaussian(4, 256)
    weight[:, 128:] = constants[:, None]
    got = restored(weight, config)[:, 128:]
    torch.testing.assert_close(got, weight[:, 128:], rtol=HALF_ROUNDING, atol=0)


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16])
@pytest.mark.parametrize("scope", ["tensor", "channel", "group"])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_few_distinct_weights_are_exact(count: int, scope: Any, method: Any) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator) * torch.tensor([1e-3, 1.0, 30.0])[:, None]
    shared = values[:1] if scope == "tensor" else values
    weight = torch.stack([v[torch.randint(count, (300,), generator=generator)] for v in shared])
    config = Int4(codebook="kmeans", codebook_scope=scope, method=method)
    assert_same_bits(restored(weight, config), weight)


@each
@pytest.mark.parametrize("magnitude", [3.4e38, 1e30, 1e7, 1e-7, 1e-30])
def test_magnitudes(config: Int4, magnitude: float) -> None:
    weight = gaussian(4, 256)
    weight = weight / weight.abs().max()
    weights = choose_int4(weight * magnitude, config)
    if config.codebook_scope != "group":  # its scales are all 1
        assert weights.weight_scale.dtype == torch.float32
    got = formats.dequantize_int4(weights)
    assert bool(torch.isfinite(got).all())
    relative = (got.double() / magnitude - weight.double()).square().mean() / weight.double().square().mean()
    assert float(relative) < 0.03


@each
def test_weights_too_small_for_a_scale(config: Int4) -> None:
    got = restored(torch.full((2, 40), 1e-44), config)
    assert float(got.abs().max()) <= 2e-44


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_the_row(config: Int4, value: float) -> None:
    weight = torch.ones(5, 3)
    weight[3, 1] = value
    weight[4, 0] = value
    with pytest.raises(
        ValueError, match=r"choose_int4: weight row 3 holds NaN or infinity \(2 such rows\); repair"
    ):
        choose_int4(weight, config)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"must have 2 dimensions, got shape \(2, 3, 4\)"):
        choose_int4(torch.ones(2, 3, 4), Int4())


def test_many_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(40, 200)
    for config in (
        Int4(),
        Int4(rotation=True),
        Int4(codebook="kmeans"),
        Int4(codebook="kmeans", rotation=True),
    ):
        monkeypatch.setattr(choose, "CHUNK", 1 << 30)
        whole = choose_int4(weight, config)
        monkeypatch.setattr(choose, "CHUNK", 450)  # two rows
        parts = choose_int4(weight, config)
        assert_same_bits(parts.qweight, whole.qweight)
        assert_same_bits(parts.weight_scale, whole.weight_scale)


# ---- the parts -------------------------------------------------------------------------------------------


def test_round_to_nearest_known_values() -> None:
    groups = torch.tensor([[-1.0, 0.5, 2.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    scale, zero = choose.round_to_nearest(groups, symmetric=True)
    assert zero is None
    torch.testing.assert_close(scale[:, 0], torch.tensor([2 / 7.5, -3 / 8, 0.0, 3 / 7.5]))
    scale, zero = choose.round_to_nearest(groups, symmetric=False)
    assert zero is not None
    torch.testing.assert_close(scale[:, 0], torch.tensor([0.2, 0.2, 0.0, 0.2]))
    torch.testing.assert_close(zero[:, 0], torch.tensor([5.0, 0.0, 0.0, 0.0]))


def squared(
    groups: Tensor, uniform: choose.Uniform, importance: Tensor | None = None, p: float = 2.0
) -> Tensor:
    scale, zero = uniform
    z = 8 if zero is None else zero
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    codes = (groups * inverse + z).round().clamp(0, 15)
    wrong = (groups - (codes - z) * scale).abs().pow(p)
    return (wrong if importance is None else wrong * importance).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_clip_search_is_never_worse_than_rounding_and_hqq_than_it(symmetric: bool, weighed: bool) -> None:
    groups = gaussian(200, 64) * torch.logspace(-3, 3, 200)[:, None]
    groups[:50, 0] *= 20  # outliers
    importance = gaussian(1, 64, 5)[0].exp() if weighed else None
    rounded = choose.round_to_nearest(groups, symmetric)
    clipped = choose.least_squares_clip(groups, symmetric, importance)
    split = choose.half_quadratic(groups, symmetric, importance)
    rtn, mse = squared(groups, rounded, importance), squared(groups, clipped, importance)
    slack = 1 + 1e-5  # errors were compared in float32
    assert bool((mse <= rtn * slack).all())
    assert float((mse / rtn).mean()) < 0.85
    mse7, hqq7 = squared(groups, clipped, importance, 0.7), squared(groups, split, importance, 0.7)
    # HQQ counts errors below a thousandth of a step as that.
    assert bool((hqq7 <= mse7 * 1.01).all())
    assert float((hqq7 / mse7).mean()) < 0.999


def test_clip_search_against_a_fine_grid() -> None:
    groups = gaussian(30, 128)
    best = torch.full((30,), torch.inf)
    for scale in torch.linspace(0.15, 0.6, 150):
        for sign in (1, -1):
            best = torch.minimum(best, squared(groups, (torch.full((30, 1), sign * float(scale)), None)))
    found = squared(groups, choose.least_squares_clip(groups, symmetric=True))
    assert float((found / best).max()) < 1.03
    assert float((found / best).mean()) < 1.005


def test_symmetric_scales_use_both_signs() -> None:
    groups = torch.zeros(1, 16)
    groups[0, :2] = torch.tensor([8.0, -7.0])
    scale, _ = choose.least_squares_clip(groups, symmetric=True)
    torch.testing.assert_close(scale, torch.tensor([[-1.0]]))
    scale, _ = choose.least_squares_clip(-groups, symmetric=True)
    torch.testing.assert_close(scale, torch.tensor([[1.0]]))


def test_nf4_is_the_published_table() -> None:
    weights = choose_int4(gaussian(), Int4(codebook="nf4", method="rtn"))
    assert weights.codebook is not None
    assert weights.codebook.tolist() == list(choose.NF4)
    assert len(choose.NF4) == 16
    assert sorted(choose.NF4) == list(choose.NF4)
    groups = gaussian()[:, :128]
    torch.testing.assert_close(weights.weight_scale[:, 0], groups.abs().amax(1).half())


def test_kmeans_against_plain_lloyd() -> None:
    values, weight = gaussian(7, 500), gaussian(7, 500, 1).exp()
    tables = choose.kmeans_tables(values, weight, iterations=30)
    assert bool((tables.diff(dim=1) >= 0).all())
    for row in range(7):
        x, w = values[row].double(), weight[row].double()
        assert len(torch.bucketize(values[row], (tables[row, 1:] + tables[row, :-1]) / 2).unique()) == 16
        spread = torch.stack([x.quantile((i + 0.5) / 16) for i in range(16)])
        for _ in range(30):
            owner = (x[:, None] - spread).abs().argmin(1)
            spread = torch.stack([(x * w)[owner == i].sum() / w[owner == i].sum() for i in range(16)])
        plain = (w * (x[:, None] - spread).abs().amin(1).square()).sum()
        ours = (w * (x[:, None] - tables[row].double()).abs().amin(1).square()).sum()
        assert float(ours) < 1.1 * float(plain)


def test_kmeans_loses_no_cluster() -> None:
    # Begun evenly, all but two or three clusters are empty.
    values = torch.cat((torch.linspace(0, 1e-3, 60), torch.tensor([1.0, 1.1, 1.3, 50.0]))).repeat(3, 1)
    table = choose.kmeans_tables(values)
    index = torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, values)
    assert [len(row.unique()) for row in index] == [16] * 3
    worst = (values - table.gather(1, index)).abs().amax()
    assert float(worst) < 0.051


def test_tables_lie_on_the_int8_grid() -> None:
    for scope in ("tensor", "channel", "group"):
        config = Int4(codebook="kmeans", codebook_scope=scope)  # type: ignore[arg-type]
        table = choose_int4(gaussian(), config).codebook
        assert table is not None
        rows = table.view(-1, 16)
        assert_same_bits(formats.dequantize_int8(*formats.quantize_int8(rows)), rows)


# ---- importance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [False, True])
def test_column_importance(rotated: bool) -> None:
    weight = torch.ones(4, 64)
    weight[:, 0], weight[:, 1], weight[:, 2] = 2, 0.5, 0
    stored = formats.rotate(weight) if rotated else weight
    importance = choose.column_importance(stored, rotated)
    mean = float(weight.mean())
    torch.testing.assert_close(importance[:4], torch.tensor([mean**2 / 4, mean**2 / 0.25, 16.0, mean**2]))
    assert choose.column_importance(torch.zeros(3, 32)).tolist() == [16.0] * 32
    assert choose.column_importance(torch.zeros(0, 5)).tolist() == [16.0] * 5


def output_error(weight: Tensor, config: Int4, power: Tensor) -> float:
    """Mean squared error of the outputs where input k has the power ``power[k]``, over their power."""
    rotated = bool(config.rotation)
    got = restored(formats.rotate(weight) if rotated else weight, config)
    wrong = (formats.rotate(got, 1 / 16) if rotated else got) - weight
    return float((wrong.square() * power).sum() / (weight.square() * power).sum())


@pytest.mark.parametrize("config", [c for c in ALL if c.method != "rtn"], ids=name)
def test_codes_protect_the_inputs_that_matter(config: Int4, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = uneven()
    power = 1 / weight.square().mean(0)
    shaped = output_error(weight, replace(config, rotation=True), power)
    monkeypatch.setattr(choose, "column_importance", lambda weight, rotated: torch.ones(weight.shape[1]))
    plain = output_error(weight, replace(config, rotation=True), power)
    assert shaped < 0.8 * plain


@pytest.mark.parametrize("config", [Int4(), Int4(codebook="kmeans"), Int4(codebook="nf4")], ids=name)
def test_importance_counts_without_rotation_too(config: Int4, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = uneven()
    power = 1 / weight.square().mean(0)
    weighed = output_error(weight, config, power)
    monkeypatch.setattr(choose, "column_importance", lambda weight, rotated: torch.ones(weight.shape[1]))
    assert weighed < 0.97 * output_error(weight, config, power)


def test_coordinate_descent_without_preference_is_rounding() -> None:
    weight = formats.rotate(gaussian(9, 64)).unflatten(1, (-1, 16))

    def nearest(values: Tensor) -> tuple[Tensor, Tensor]:
        codes = (values / 2).round()
        return codes, codes * 2

    codes = choose.coordinate_descent(weight, torch.full((4, 16), 3.0), nearest)
    assert_same_bits(codes, (weight / 2).round())


def test_coordinate_descent_ends_where_no_code_can_improve(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = formats.rotate(uneven(6, 32)).unflatten(1, (2, 16)).double()
    importance = gaussian(2, 16, 4).exp().double()
    hadamard = formats.rotate(torch.eye(16)).double()

    def nearest(values: Tensor) -> tuple[Tensor, Tensor]:
        codes = (values / 2).round()
        return codes, codes * 2

    def loss(codes: Tensor) -> Tensor:
        return (((weight - codes * 2) @ hadamard).square() * importance).sum(-1)

    before = loss((weight / 2).round())
    for sweeps in (1, 2, 3, 20):
        monkeypatch.setattr(choose, "SWEEPS", sweeps)
        codes = choose.coordinate_descent(weight, importance, nearest)
        after = loss(codes)
        assert float(after.sum()) <= float(before.sum())
        before = after
    for j in range(16):
        for step in (-1, 1):
            other = codes.clone()
            other[..., j] += step
            assert bool((loss(other) >= after * (1 - 1e-9)).all())


def test_rtn_is_plain_rounding_in_the_rotated_basis_too() -> None:
    weight = formats.rotate(uneven())
    for config in (Int4(method="rtn"), Int4(codebook="nf4", method="rtn")):
        plain, rotated = choose_int4(weight, config), choose_int4(weight, replace(config, rotation=True))
        assert_same_bits(plain.qweight, rotated.qweight)


def test_every_number_of_an_embedding_counts_alike() -> None:
    table = uneven()

    def error(weights: formats.Int4Weights) -> float:
        return float((formats.dequantize_int4(weights) - table).square().mean())

    for config in UNIFORM:
        chosen = choose_int4(table, config, embedding=True)
        if config.method == "mse":
            assert error(chosen) < error(choose_int4(table, config))
        assert error(chosen) <= 1.001 * error(choose_int4(table, config))
        rotated = choose_int4(table, replace(config, rotation=True), embedding=True)
        assert_same_bits(rotated.qweight, chosen.qweight)
        embedding = torch.nn.Embedding(*table.shape, _weight=table)
        layer = lissom.nn.Int4Embedding.from_embedding(embedding, replace(config, rotation=True))
        assert_same_bits(layer.qweight, chosen.qweight)
