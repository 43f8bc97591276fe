"""Activation functions fused into compressed linears: what is recognised, what must not be, and files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lissom
from lissom.compress.fuse import recognise
from lissom.config import Config
from lissom.nn import FusedActivation, Int4Linear, Int8Linear

SIZE = lissom.Int8(prefer="size")  # converts whatever the clock says
SIZE4 = lissom.Int4(prefer="size")
FLOAT4 = lissom.Int4(activation=None, codebook="nf4", prefer="size")
X = torch.randn(24, 64)


def mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), activation, nn.Linear(96, 8)).eval()


@pytest.mark.parametrize(
    ("config", "linear"),
    [(SIZE, Int8Linear), (SIZE4, Int4Linear), (FLOAT4, Int4Linear)],
    ids=["int8", "int4", "int4 weight-only"],
)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
    ],
)
def test_fused_pairs_compute_what_the_pair_computed(
    module: nn.Module, name: str, config: Config, linear: type[nn.Module]
) -> None:
    model = mlp(module)
    assert recognise(module) == name
    separate = copy.deepcopy(model)
    lissom.compress_(separate, config)  # without example inputs nothing is known about who reads what
    report = lissom.compress_(model, config, example_inputs=X)
    assert isinstance(model[0], linear)
    assert model[0].act_fn == name
    assert isinstance(model[1], FusedActivation)
    assert report.layers[0].act_fn == name
    assert report.layers[1].act_fn is None
    torch.testing.assert_close(model(X), separate(X), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "module",
    [
        nn.Tanh(),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.ELU(),
        nn.Softmax(dim=-1),
        nn.GLU(),
        nn.Hardswish(),
        nn.Dropout(),
    ],
)
def test_other_functions_are_not_recognised(module: nn.Module) -> None:
    assert recognise(module.eval()) is None


def test_transformers_activations_are_recognised() -> None:
    activations = pytest.importorskip("transformers.activations")
    found = {
        name: recognise(activations.ACT2FN[name]) for name in ("gelu", "gelu_new", "relu", "silu", "tanh")
    }
    assert found == {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "tanh": None}


class Residual(nn.Module):
    """The linear's output is read a second time, after the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(64, 64), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.activation(y) + y


class Returned(Residual):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.linear(x)
        return self.activation(y), y


class Half(Residual):
    """Only a part of the output goes through the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)[:, :32])


class Functional(Residual):
    """The module is also called on something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)) + self.activation(x)


class Twice(Residual):
    """One of two calls of the linear bypasses the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)) + F.relu(self.linear(x + 1))


@pytest.mark.parametrize("model_class", [Residual, Returned, Half, Functional, Twice])
def test_nothing_is_fused_where_that_would_change_the_model(model_class: type[Residual]) -> None:
    model = model_class().eval()
    expected = model(X)
    lissom.compress_(model, SIZE, example_inputs=X)
    assert isinstance(model.linear, Int8Linear)
    assert model.linear.act_fn is None
    assert isinstance(model.activation, nn.GELU)
    torch.testing.assert_close(model(X), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("last", [SIZE, SIZE4], ids=["int8", "int4"])
def test_a_module_shared_by_linears_is_fused_only_with_all_of_them(last: Config) -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(64, 48), shared, nn.Linear(48, 32), shared, nn.Linear(32, 8)).eval()
    partly, wholly = copy.deepcopy(model), copy.deepcopy(model)
    lissom.compress_(partly, {"2": None, "*": SIZE}, example_inputs=X)
    assert isinstance(partly[1], nn.ReLU)
    assert partly[1] is partly[3]
    assert partly[0].act_fn is None
    lissom.compress_(wholly, {"2": last, "*": SIZE}, example_inputs=X)
    assert isinstance(wholly[1], FusedActivation)
    assert wholly[1] is wholly[3]
    assert wholly[2].act_fn == "relu"
    for compressed in (partly, wholly):
        torch.testing.assert_close(compressed(X), model(X), rtol=0.1, atol=0.1)


def test_a_hooked_activation_stays() -> None:
    model = mlp(nn.ReLU())
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    lissom.compress_(model, SIZE, example_inputs=X)
    seen.clear()
    model(X)
    assert isinstance(model[1], nn.ReLU)
    assert len(seen) == 1


def test_a_linear_that_stays_dense_keeps_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    from lissom.compress import measure

    slower = measure.PairedTiming(before_us=1.0, after_us=2.0, ratio=2.0, rounds=5)
    monkeypatch.setattr(measure, "time_pair", lambda *args, **kwargs: slower)
    model = mlp(nn.GELU())
    expected = model(X)
    report = lissom.compress_(model, lissom.Int8(), example_inputs=X)
    assert [layer.status for layer in report.layers] == ["kept dense", "kept dense"]
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("config", [lissom.Int8(), lissom.Int4()], ids=["int8", "int4"])
def test_a_linear_whose_fellow_stays_dense_is_not_fused(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    from lissom.compress import measure

    def fake(before: object, after: object, **_: object) -> measure.PairedTiming:
        times.append(2.0 if len(times) == 1 else 0.5)
        return measure.PairedTiming(before_us=1.0, after_us=times[-1], ratio=times[-1], rounds=5)

    times: list[float] = []
    monkeypatch.setattr(measure, "time_pair", fake)
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(64, 48), shared, nn.Linear(48, 32), shared, nn.Linear(32, 8)).eval()
    expected = model(X)
    report = lissom.compress_(model, config, example_inputs=X)
    assert [layer.status for layer in report.layers] == ["converted", "kept dense", "converted"]
    assert model[0].act_fn is None
    assert isinstance(model[1], nn.ReLU)
    torch.testing.assert_close(model(X), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("config", [SIZE, SIZE4], ids=["int8", "int4"])
def test_files_hold_fused_models(tmp_path: Path, config: Config) -> None:
    model = mlp(nn.GELU())
    fresh = copy.deepcopy(model)
    lissom.compress_(model, config, example_inputs=X)
    lissom.save(model, tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved", model=fresh)
    assert isinstance(loaded[1], FusedActivation)
    assert torch.equal(loaded(X), model(X))
    other = mlp(nn.ReLU())
    with pytest.raises(lissom.FormatError, match=r"'1' was saved as a gelu that the linear before"):
        lissom.load(tmp_path / "saved", model=other)
    assert isinstance(other[0], nn.Linear)
