"""SmoothQuant: which norms may be folded, that folding changes nothing in float, and that it helps int8."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lissom import Int8, compress_
from lissom.compress import measure
from lissom.compress.measure import PairedTiming
from lissom.compress.smooth import smoothing_factors
from lissom.nn import Int8Linear

SMOOTH = Int8(smooth=0.5, prefer="size")


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class GemmaRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class PreNorm(nn.Module):
    """A pre-norm block: ``norm`` feeds q, k, v through views; the residual goes around it."""

    def __init__(self, norm: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v = (nn.Linear(width, width, bias=i > 0) for i in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(x))
        flat = h.reshape(-1, h.shape[-1])
        mixed = torch.sigmoid(self.q(flat)) * self.k(flat)
        return x + mixed.view(x.shape) + self.v(h[:, :1])


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.q(h) + self.k(h) + self.v(h)


def with_outliers(
    make_norm: Callable[[int], nn.Module] = nn.LayerNorm, cls: type[PreNorm] = PreNorm
) -> PreNorm:
    model = cls(make_norm(32))
    with torch.no_grad():
        model.norm.weight[[3, 17]] = 40.0  # type: ignore[index,operator]
        if isinstance(model.norm, nn.LayerNorm):
            model.norm.bias.copy_(torch.randn(32))
    return model.eval()


def notes(model: nn.Module, config: Int8 = SMOOTH, x: Tensor | None = None) -> list[str]:
    x = torch.randn(4, 6, 32) if x is None else x
    return compress_(model, config, example_inputs=x).notes


@pytest.fixture
def slow_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer but the first one timed (q) turns out slower, so that it stays dense."""
    calls: list[int] = []

    def fake(before: Any, after: Any, **_: Any) -> PairedTiming:
        calls.append(1)
        ratio = 0.5 if len(calls) == 1 else 2.0
        return PairedTiming(10.0, 10.0 * ratio, ratio, 5)

    monkeypatch.setattr(measure, "time_pair", fake)


@pytest.mark.parametrize("make_norm", [nn.LayerNorm, nn.RMSNorm, RMSNorm])
def test_folding_changes_nothing_in_float(make_norm: Callable[[int], nn.Module], slow_int8: None) -> None:
    """q becomes int8, k and v stay dense with smoothed weights: compare what these two compute."""
    model = with_outliers(make_norm)
    x = torch.randn(4, 6, 32)
    h = model.norm(x)
    expected_k, expected_v = model.k(h), model.v(h)
    original = copy.deepcopy(model)
    report = compress_(model, Int8(smooth=0.5), example_inputs=x)
    assert [layer.status for layer in report.layers] == ["converted", "kept dense", "kept dense"]
    assert {layer.smoothed_by for layer in report.layers} == {"norm"}
    assert not torch.allclose(model.norm.weight, original.norm.weight)
    assert type(model.k) is nn.Linear
    smoothed = model.norm(x)
    torch.testing.assert_close(model.k(smoothed), expected_k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.v(smoothed), expected_v, rtol=1e-4, atol=1e-4)
    assert float(smoothed.abs().max()) < float(h.abs().max()) / 2


@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_smoothing_lowers_the_error_where_channels_have_outliers(activation: Any) -> None:
    x = torch.randn(8, 6, 32)
    plain, smooth = with_outliers(), with_outliers()
    smooth.load_state_dict(plain.state_dict())
    batches = [x, torch.randn(8, 6, 32)]
    config = Int8(activation=activation, prefer="size")
    before = compress_(plain, config, example_inputs=x, calibration=batches)
    config = Int8(activation=activation, prefer="size", smooth=0.5)
    after = compress_(smooth, config, example_inputs=x, calibration=iter(batches))
    assert after.notes == []
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new.sqnr_db is not None
        assert old.sqnr_db is not None
        assert new.sqnr_db > old.sqnr_db + 1
    assert after.cosine is not None
    assert before.cosine is not None
    assert after.cosine > before.cosine


def test_calibration_alone_is_enough() -> None:
    model = with_outliers()
    report = compress_(model, SMOOTH, calibration=(torch.randn(2, 3, 32) for _ in range(2)))
    assert {layer.smoothed_by for layer in report.layers} == {"norm"}
    assert all(isinstance(m, Int8Linear) for m in (model.q, model.k, model.v))


def test_factors() -> None:
    s = smoothing_factors(
        torch.tensor([16.0, 1.0, 0.0, 2.0, 1e9]), torch.tensor([1.0, 4.0, 1.0, 0.0, 1e-9]), 0.5
    )
    assert s.tolist() == [4.0, 0.5, 1.0, 1.0, 1e4]
    assert smoothing_factors(torch.tensor([3.0]), torch.tensor([7.0]), 1.0).item() == 3.0
    assert smoothing_factors(torch.tensor([3.0]), torch.tensor([4.0]), 0.0).item() == 0.25


def test_factors_take_the_largest_weight_of_all_linears() -> None:
    model = with_outliers()
    with torch.no_grad():
        model.k.weight[0, 5] = 100.0
    x = torch.randn(4, 6, 32)
    activation = model.norm(x).abs().flatten(0, 1).amax(0)
    expected = (activation[5] / 100.0) ** 0.5
    before = model.norm.weight.clone()
    compress_(model, SMOOTH, example_inputs=x)
    ratio = before[5] / model.norm.weight[5]  # type: ignore[index,operator]
    torch.testing.assert_close(ratio, expected)


# --- norms that must not be folded --------------------------------------------------------------------------


def assert_not_folded(model: PreNorm, reason: str, config: Int8 = SMOOTH) -> None:
    weight = model.norm.weight.clone()
    x = torch.randn(4, 6, 32)
    expected = model(x)
    found = notes(model, config, x)
    assert any(f"norm was not folded: {reason}" in note for note in found), found
    assert torch.equal(model.norm.weight, weight)
    assert F.cosine_similarity(model(x).flatten(), expected.flatten(), dim=0) > 0.99


def test_post_norm_feeds_the_residual() -> None:
    assert_not_folded(with_outliers(cls=PostNorm), "its output is not read by linears only (aten.add.Tensor")


def test_norm_that_adds_one_to_its_weight() -> None:
    assert_not_folded(with_outliers(GemmaRMSNorm), "its output is not proportional to its weight")


def test_norm_whose_output_the_model_returns() -> None:
    class Returns(PreNorm):
        def forward(self, x: Tensor) -> Any:
            h = self.norm(x)
            return self.q(h) + self.k(h) + self.v(h), {"hidden": h[0]}

    model = with_outliers(cls=Returns)
    found = notes(model)
    assert any("the model returns it" in note for note in found), found


def test_norm_that_also_feeds_a_layer_left_alone() -> None:
    model = with_outliers()
    x = torch.randn(4, 6, 32)
    expected = model(x)
    report = compress_(model, {"v": None, "*": SMOOTH}, example_inputs=x)
    assert any("v, which reads its output, is left alone" in note for note in report.notes)
    assert F.cosine_similarity(model(x).flatten(), expected.flatten(), dim=0) > 0.99


def test_linear_that_is_also_fed_by_something_else() -> None:
    class TwoSources(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.q(h) + self.k(h) + self.v(h) + self.v(x)

    assert_not_folded(with_outliers(cls=TwoSources), "v is not fed by it alone")


def test_linear_that_sees_the_channels_in_another_order() -> None:
    class Flipped(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.q(h) + self.k(h) + self.v(h.unfold(2, 32, 32).squeeze(2).transpose(1, 2).mT[..., :32])

        def __init__(self, norm: nn.Module) -> None:
            super().__init__(norm)

    class Reshaped(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.q(h) + self.k(h) + self.v(h.as_strided((4, 5, 32), (192, 32, 1), 16)).mean()

    assert_not_folded(
        with_outliers(cls=Reshaped), "its output is not read by linears only (v reads it in another"
    )
    assert notes(with_outliers(cls=Flipped)) == []  # views that end up as they began are fine


def test_tied_linear() -> None:
    model = with_outliers()
    model.k.weight = model.q.weight
    assert_not_folded(model, "the weight of q is tied to another layer's")


def test_shared_norm_parameter() -> None:
    model = with_outliers()
    model.other = nn.LayerNorm(32)
    model.other.weight = model.norm.weight  # type: ignore[assignment]
    assert_not_folded(model, "its parameters are shared with another module")


def test_configs_that_differ() -> None:
    model = with_outliers()
    report = compress_(model, {"q": Int8(prefer="size"), "*": SMOOTH}, example_inputs=torch.randn(4, 6, 32))
    assert any("the configs of q, k, v differ in smooth" in note for note in report.notes)


def test_model_without_norms_says_so() -> None:
    report = compress_(nn.Sequential(nn.Linear(8, 8)), SMOOTH, example_inputs=torch.randn(2, 8))
    assert report.notes == ["smooth: no norm could be folded into the linears after it; nothing was smoothed"]


def test_one_norm_called_twice_serves_both_calls() -> None:
    class Twice(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.q(self.norm(x)) + self.k(self.norm(x * 2)) + self.v(self.norm(x + 1))

    model = with_outliers(cls=Twice)
    x = torch.randn(4, 6, 32)
    expected = model(x)
    assert notes(model, SMOOTH, x) == []
    assert F.cosine_similarity(model(x).flatten(), expected.flatten(), dim=0) > 0.999


# --- pairs by name ------------------------------------------------------------------------------------------


def test_named_pairs() -> None:
    model = with_outliers()
    weight = model.norm.weight.clone()
    config = Int8(smooth=0.5, smooth_pairs={"norm": ("q", "k", "v")}, prefer="size")
    report = compress_(model, config, example_inputs=torch.randn(4, 6, 32))
    assert {layer.smoothed_by for layer in report.layers} == {"norm"}
    assert not torch.equal(model.norm.weight, weight)


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        (
            {"nrom": ("q",)},
            "'nrom' must be a LayerNorm or RMSNorm with a weight, but there is no such module",
        ),
        ({"q": ("k",)}, "'q' must be a LayerNorm or RMSNorm with a weight, but it is a Linear"),
        ({"norm": ("drop",)}, "'drop' must be a linear layer, but it is a Dropout"),
        ({"norm": ("x",)}, "'x' must be a linear layer, but there is no such module"),
        ({"norm": ()}, "names no linear"),
        ({"norm": ("wide",)}, "'wide' has in_features=64 but the norm has 32 channels"),
        ({"norm": ("q", "k")}, "'norm' cannot be folded into q, k: it also feeds v; name them too"),
        ({"norm": ("q", "k", "v", "after")}, "after is not fed by it alone"),
    ],
)
def test_named_pairs_that_do_not_fit(pairs: dict[str, tuple[str, ...]], text: str) -> None:
    class Extended(PreNorm):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__(norm)
            self.after = nn.Linear(32, 64)
            self.wide = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.after(super().forward(x)))

    model = with_outliers(cls=Extended)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = Int8(smooth=0.5, smooth_pairs=pairs, prefer="size")
    with pytest.raises(ValueError, match=f"smooth_pairs.*{text}"):
        compress_(model, config, example_inputs=torch.randn(4, 6, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.q) is nn.Linear


def test_named_pairs_in_a_post_norm_model_are_refused() -> None:
    config = Int8(smooth=0.5, smooth_pairs={"norm": ("q", "k", "v")})
    with pytest.raises(ValueError, match="its output is not read by linears only"):
        compress_(with_outliers(cls=PostNorm), config, example_inputs=torch.randn(4, 6, 32))


def test_gpt2_is_smoothed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2Model(config).eval()
    ids = torch.randint(0, 60, (3, 9))
    report = compress_(model, SMOOTH, example_inputs={"input_ids": ids})
    smoothed = {layer.name: layer.smoothed_by for layer in report.layers}
    assert smoothed["h.0.attn.c_attn"] == "h.0.ln_1"
    assert smoothed["h.0.mlp.c_fc"] == "h.0.ln_2"
    assert smoothed["h.0.mlp.c_proj"] is None
    assert report.cosine is not None
    assert report.cosine > 0.999
