"""``SparseLinear``: drop-in behaviour, state, moves, copies, conversion, training, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lissom import BlockSparse, formats
from lissom.formats import BlockSparseWeights
from lissom.nn import SparseLinear
from lissom.nn import sparse as sparse_module
from lissom.testing import ACT_FNS, DTYPES, assert_same_bits

BLOCKS = [(8, 1), (16, 1), (4, 4), (8, 4), (16, 4), (16, 16), (32, 32), (64, 64), (1, 1), (3, 5)]
VALUES = ["float32", "bfloat16", "float16", "int8"]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Sums of some 40 products of size one in another order; for half types, one rounding of the result."""


def linear(k: int = 20, n: int = 18, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(k * 100 + n)
    return nn.Linear(k, n, bias=bias).to(dtype)


def sparse(
    values: Any = "float32", block_shape: Any = (8, 4), sparsity: float = 0.5, **options: Any
) -> SparseLinear:
    act_fn = options.pop("act_fn", None)
    config = BlockSparse(sparsity, block_shape, dtype=values)
    return SparseLinear.from_linear(linear(**options), config, act_fn=act_fn)


def assert_same_layer(a: SparseLinear, b: SparseLinear) -> None:
    """Same settings, state and outputs."""
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    state_a, state_b = a.state_dict(), b.state_dict()
    assert list(state_a) == list(state_b)
    for name in state_a:
        assert_same_bits(state_a[name], state_b[name])
    x = torch.randn(3, a.in_features)
    assert_same_bits(a(x).detach(), b(x).detach())


def snapshot(layer: SparseLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_unchanged(layer: SparseLinear, before: dict[str, Tensor]) -> None:
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, before[name])


# ------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("values", VALUES)
def test_is_the_dense_layer_with_zeros(values: str, bias: bool, act_fn: str | None) -> None:
    layer = sparse(values, bias=bias, act_fn=act_fn)
    x = torch.randn(5, 20)
    expected = F.linear(x, layer.to_dense(torch.float32), layer.bias)
    functions: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda y: y,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "silu": F.silu,
    }
    # int8 rounds the activations too: about one percent.
    atol = 0.03 if values == "int8" else TOLERANCE[torch.float32]
    torch.testing.assert_close(layer(x), functions[act_fn](expected), rtol=0, atol=atol)


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_every_block_shape(values: Any, block_shape: Any) -> None:
    original = linear(70, 66)
    layer = SparseLinear.from_linear(original, BlockSparse(0.5, block_shape, dtype=values))
    kept = formats.block_mask(layer.to_dense() != 0, block_shape)
    dropped = formats.block_mask(torch.ones(66, 70, dtype=torch.bool), block_shape).numel() // 2
    assert int((~kept).sum()) == dropped
    places = torch.ones(block_shape)
    mask = torch.kron(kept.float(), places)[:66, :70].bool()
    error = (layer.to_dense(torch.float32) - original.weight * mask).detach().abs().amax().item()
    assert error <= {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.004}[values] * float(
        original.weight.abs().amax()
    )
    assert layer.density == pytest.approx(float(mask.float().mean()))
    x = torch.randn(4, 70)
    y = F.linear(x, layer.to_dense(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0.03 if values == "int8" else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_every_dtype(values: Any, dtype: torch.dtype) -> None:
    original = linear(dtype=dtype)
    layer = SparseLinear.from_linear(original, BlockSparse(0.0, (8, 4), dtype=values))
    x = torch.randn(2, 3, 20).to(dtype)
    y = layer(x).detach()
    assert y.dtype == dtype
    assert y.shape == (2, 3, 18)
    assert layer.weight.dtype == dtype
    assert layer.values.dtype == getattr(torch, values)
    expected = original(x).detach().float()
    assert float((y.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 9), (33, 65)], ids=str)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_any_shape(shape: tuple[int, int], m: int) -> None:
    n, k = shape
    layer = sparse(k=k, n=n, block_shape=(8, 1))
    y = layer(torch.randn(m, k))
    assert y.shape == (m, n)
    assert layer.weight.shape == shape


@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0)])
def test_without_weights(n: int, k: int) -> None:
    layer = SparseLinear(k, n)
    assert_same_bits(layer(torch.randn(3, k)).detach(), torch.zeros(3, n))
    assert layer.density == 0


@pytest.mark.parametrize("values", VALUES)
def test_all_zero_and_fully_dense(values: Any) -> None:
    original = linear()
    dense = SparseLinear.from_linear(original, BlockSparse(0.0, (8, 4), dtype=values))
    assert dense.density == 1
    nn.init.zeros_(original.weight)
    zero = SparseLinear.from_linear(original, BlockSparse(0.5, (8, 4), dtype=values))
    x = torch.randn(3, 20)
    assert torch.equal(zero(x), original.bias.expand(3, 18))
    empty = SparseLinear.from_dense(original.weight, original.weight != 0, bias=original.bias)
    assert empty.values.shape == (0, 8, 1)
    assert torch.equal(empty(x), original.bias.expand(3, 18))


def test_constructed_it_is_zero() -> None:
    x = torch.randn(3, 20)
    layer = SparseLinear(20, 18, block_shape=(8, 4), blocks=7)
    formats.check_block_sparse(layer.sparse)
    assert (layer.crow_indices.tolist(), layer.col_indices.tolist()) == ([0, 5, 7, 7], [0, 1, 2, 3, 4, 0, 1])
    assert torch.equal(layer(x), torch.zeros(3, 18))
    assert SparseLinear(20, 18, bias=False)(x).detach().any().item() is False
    quantized = SparseLinear(20, 18, block_shape=(4, 4), blocks=3, dtype=torch.int8)
    assert quantized.bias is not None
    assert quantized.bias.dtype == torch.float32
    assert torch.equal(quantized(x), torch.zeros(3, 18))


@pytest.mark.parametrize("block_shape", [(8, 1), (16, 4), (64, 64)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_memory(block_shape: Any, sparsity: float) -> None:
    layer = sparse(block_shape=block_shape, sparsity=sparsity, n=512, k=512, bias=False)
    tensors = [*layer.parameters(), *layer.buffers()]
    held = sum(t.untyped_storage().nbytes() for t in tensors)
    assert held <= 1.15 * layer.density * 512 * 512 * 4


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (3, 5)], ids=str)
def test_made_some_rows_at_a_time(block_shape: Any, values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sparse(values, block_shape, n=50, k=33)
    monkeypatch.setattr(sparse_module, "CHUNK", 600)
    assert_same_layer(sparse(values, block_shape, n=50, k=33), whole)
    with pytest.raises(ValueError, match=r"mask must be bool .* of the weight \(50, 33\)"):
        SparseLinear.from_mask(linear(33, 50), torch.ones(13, 34, dtype=torch.bool), block_shape)


def test_rows_that_meet_no_block_have_no_influence() -> None:
    mask = torch.zeros(18, 20, dtype=torch.bool)
    mask[:, 3] = True
    layer = SparseLinear.from_dense(torch.randn(18, 20), mask)
    x = torch.randn(2, 20)
    y = layer(x)
    x[:, 4] = float("nan")
    assert torch.equal(layer(x), y)


# ------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("method", ["l1", "l2", "wanda"])
@pytest.mark.parametrize("training", [True, False])
def test_from_linear_leaves_the_original_unchanged(method: Any, training: bool) -> None:
    original = linear().train(training)
    before = copy.deepcopy(original.state_dict())
    norm = torch.rand(20) if method == "wanda" else None
    layer = SparseLinear.from_linear(original, BlockSparse(0.5, method=method), activation_norm=norm)
    assert layer.training is training
    assert layer.bias is original.bias, "the bias parameter is taken over, not copied"
    assert layer.block_shape == (8, 1)
    for name, tensor in original.state_dict().items():
        assert_same_bits(tensor, before[name])
    with torch.no_grad():
        layer.values.add_(1)
    assert_same_bits(original.weight.detach(), before["weight"])


def test_wanda_keeps_what_meets_large_inputs() -> None:
    original = linear()
    norm = torch.ones(20)
    norm[:4] = 1000.0
    layer = SparseLinear.from_linear(original, BlockSparse(0.8, method="wanda"), activation_norm=norm)
    assert layer.col_indices.unique().tolist() == [0, 1, 2, 3]


def test_from_dense_with_a_mask_of_elements_or_blocks() -> None:
    weight = torch.randn(18, 20)
    mask = torch.rand(18, 20) < 0.1
    bias = nn.Parameter(torch.randn(18))
    layer = SparseLinear.from_dense(weight, mask, bias=bias, block_shape=(4, 4))
    assert torch.equal(layer.to_dense(), weight * mask)
    assert layer.bias is bias
    blocks = formats.block_mask(mask, (4, 4))
    whole = SparseLinear.from_dense(weight, blocks, block_shape=(4, 4), dtype=torch.bfloat16)
    expected = (weight * torch.kron(blocks.float(), torch.ones(4, 4))[:18]).bfloat16()
    assert torch.equal(whole.to_dense(), expected)
    assert whole.weight.dtype == torch.float32, "it stands for a float32 layer"
    for dtype, kept in ((torch.float16, torch.float16), (torch.float64, torch.float32)):
        assert SparseLinear.from_dense(weight.to(dtype), mask).values.dtype == kept


@pytest.mark.parametrize("block_shape", [(8, 1), (4, 4), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.sparse_bsr, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_to_and_from_torch(values: Any, layout: torch.layout, block_shape: Any) -> None:
    n, k = 24, 20 if block_shape != (3, 5) else 25
    layer = sparse(values, block_shape, n=n, k=k)
    tensor = layer.to_torch(layout)
    assert tensor.layout == layout
    assert_same_bits(tensor.to_dense(), layer.to_dense().detach())
    back = SparseLinear.from_torch(tensor, layer.bias, block_shape)
    assert back.block_shape == block_shape
    assert_same_bits(back.to_dense().detach(), layer.to_dense().detach())
    x = torch.randn(3, k)
    assert_same_bits(back(x), SparseLinear.from_torch(tensor, layer.bias, block_shape)(x))
    if layout == torch.sparse_csr:
        assert SparseLinear.from_torch(tensor).block_shape == (1, 1)
    else:
        assert SparseLinear.from_torch(tensor).block_shape == block_shape


def test_bsr_needs_blocks_that_divide() -> None:
    with pytest.raises(
        ValueError, match=r"torch.sparse_bsr needs blocks that divide .* use layout=torch.sparse_csr"
    ):
        sparse(block_shape=(8, 4)).to_torch()


def test_from_weights_takes_the_tensors_over() -> None:
    weights = sparse().sparse
    layer = SparseLinear.from_weights(weights)
    assert layer.values.data_ptr() == weights.values.data_ptr()
    assert isinstance(layer.values, nn.Parameter)
    assert layer.bias is None
    bad = replace(weights, col_indices=weights.col_indices + 100)
    with pytest.raises(
        ValueError, match=r"SparseLinear.from_weights: col_indices\[0\] is 10[0-9]; use 0 to 4"
    ):
        SparseLinear.from_weights(bad)
    with pytest.raises(ValueError, match=r"from_weights: bias must be floating point \[18\], got .*\(17,\)"):
        SparseLinear.from_weights(weights, torch.zeros(17))


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"dtype": torch.float64},
            "dtype=torch.float64 cannot be; use torch.float32, torch.bfloat16, torch.f",
        ),
        ({"block_shape": (8, 0)}, r"block_shape=\(8, 0\) must be two positive integers"),
        ({"block_shape": "auto"}, "block_shape='auto' is for compress_"),
        ({"blocks": -1}, r"blocks=-1 cannot be; the weight has 60 blocks of \(8, 1\)"),
        ({"blocks": 61}, "blocks=61 cannot be"),
        ({"act_fn": "tanh"}, "act_fn='tanh' is unknown"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SparseLinear(20, 18, **options)


def test_int8_has_a_limit_on_k() -> None:
    with pytest.raises(ValueError, match=r"in_features=133153 could overflow the int32 sum; .* use dtype="):
        SparseLinear(133153, 8, dtype=torch.int8, device="meta")
    SparseLinear(133153, 8, device="meta")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    original = linear()
    with torch.no_grad():
        original.weight[3, 4] = value
    with pytest.raises(ValueError, match="weight row 3 holds NaN or infinity"):
        SparseLinear.from_linear(original)
    with pytest.raises(ValueError, match="weight holds NaN or infinity; repair it first"):
        SparseLinear.from_dense(original.weight, torch.ones(18, 20, dtype=torch.bool))


@pytest.mark.parametrize(
    "mask", [torch.ones(18, 21, dtype=torch.bool), torch.ones(18, 20), torch.ones(3, 3, dtype=torch.bool)]
)
def test_masks_that_do_not_fit(mask: Tensor) -> None:
    text = r"mask must be bool \(18, 20\), as the weight, or \(3, 20\), one per block of \(8, 1\); got torch"
    with pytest.raises(ValueError, match=text):
        SparseLinear.from_dense(torch.randn(18, 20), mask)


def test_meta_layers_cannot_be_converted() -> None:
    with pytest.raises(
        ValueError, match=r"SparseLinear.from_linear: the layer is on the meta device; load its"
    ):
        SparseLinear.from_linear(nn.Linear(4, 4, device="meta"))


def test_wrong_input() -> None:
    for values in VALUES:
        with pytest.raises(ValueError, match=r"K=20; the last dimension of x must be 20"):
            sparse(values)(torch.randn(3, 21))


# ------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("values", VALUES)
def test_state_dict_is_canonical(values: Any) -> None:
    layer = sparse(values)
    names = {"values", "crow_indices", "col_indices", "bias"} | (
        {"weight_scale"} if values == "int8" else set()
    )
    assert layer.state_dict().keys() == names
    parameters = {name for name, _ in layer.named_parameters()}
    assert parameters == ({"bias"} if values == "int8" else {"bias", "values"})


@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
@pytest.mark.parametrize("blocks", [0, 3, 8, 15])
@pytest.mark.parametrize("values", VALUES)
def test_load_adopts_the_number_of_blocks(values: Any, blocks: int, assign: bool, device: str) -> None:
    layer = sparse(values)
    fresh = SparseLinear(
        20,
        18,
        block_shape=(8, 4),
        blocks=blocks,
        dtype=layer.values.dtype,
        floating_dtype=torch.float32,
        device=device,
    )
    if device == "cpu":
        fresh(torch.randn(2, 20))
    state = snapshot(layer)
    fresh.load_state_dict(state, assign=assign)
    assert_same_layer(layer, fresh)
    assert (fresh.values.data_ptr() == state["values"].data_ptr()) is assign
    fresh.load_state_dict(snapshot(sparse(values, sparsity=0.8)), assign=assign)
    assert_same_layer(fresh, sparse(values, sparsity=0.8))


def test_a_trained_parameter_stays_the_same_object() -> None:
    layer = sparse()
    values = layer.values
    layer(torch.randn(2, 20)).sum().backward()
    layer.load_state_dict(snapshot(sparse(sparsity=0.8)))
    assert layer.values is values
    layer(torch.randn(2, 20)).sum().backward()
    assert values.grad is not None
    assert values.grad.shape == values.shape


def swap(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: dict[str, Tensor]) -> None:
        result = change(state[name])
        state[name] = state[name] if result is None else result

    return edit


def set_at(index: Any, value: float) -> Callable[[Tensor], None]:
    return lambda t: t.__setitem__(index, value)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "unsorted": (
        swap("col_indices", lambda t: t.__setitem__(slice(0, 2), t[[1, 0]])),
        r"col_indices\[1\] is",
    ),
    "repeated": (
        swap("col_indices", lambda t: t.__setitem__(1, int(t[0]))),
        r"in the same block row; they must",
    ),
    "out of range": (swap("col_indices", set_at(2, 5)), r"col_indices\[2\] is 5; use 0 to 4"),
    "negative": (swap("col_indices", set_at(0, -1)), r"col_indices\[0\] is -1"),
    "crow does not begin": (swap("crow_indices", set_at(0, 1)), r"crow_indices\[0\] is 1; it must be 0"),
    "crow falls": (swap("crow_indices", set_at(2, -3)), r"crow_indices\[2\] is -3, below"),
    "crow too long": (
        swap("crow_indices", set_at(-1, 100)),
        r"crow_indices\[3\] is 100; the last one must be",
    ),
    "crow of another size": (swap("crow_indices", lambda t: t[:-1]), r"crow_indices must be int32 \[4\]"),
    "fewer values": (
        swap("values", lambda t: t[:-1]),
        r"col_indices must be int32 \[\d+\], one per stored block",
    ),
    "other blocks": (
        swap("values", lambda t: t.mT.contiguous()),
        r"are blocks of \(4, 8\), but the layer was",
    ),
    "flat values": (swap("values", lambda t: t.flatten()), r"values must have shape \[B, bh, bw\]"),
    "padding": (swap("values", set_at((-1, -1, 0), 1)), r"past N=18; values outside the weight must be 0"),
    "long indices": (swap("col_indices", Tensor.long), r"col_indices has dtype torch.int64 but must be"),
    "double values": (swap("values", Tensor.double), r"values has dtype torch.float64 but must be"),
    "bias": (
        swap("bias", lambda t: t[:-1]),
        r"bias has shape \(17,\) but must be \(18,\); nothing of this layer",
    ),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_states_change_nothing(fault: str, assign: bool) -> None:
    edit, text = FAULTS[fault]
    state = snapshot(sparse(sparsity=0.2))
    edit(state)
    layer = sparse(sparsity=0.6)
    before, x = snapshot(layer), torch.randn(2, 20)
    y = layer(x)
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state, assign=assign)
    assert_unchanged(layer, before)
    assert_same_bits(layer(x), y)


@pytest.mark.parametrize(
    ("name", "index", "value", "text"),
    [
        ("values", (0, 0, 0), -128, r"values\[0, 0, 0\] is -128; int8 values must lie"),
        ("weight_scale", 3, -1.0, r"weight_scale\[3\] is -1\.0; scales must be finite"),
        ("weight_scale", 3, float("inf"), r"weight_scale\[3\] is inf"),
    ],
)
def test_faulty_int8_states(name: str, index: Any, value: float, text: str) -> None:
    layer = sparse("int8")
    before, state = snapshot(layer), snapshot(layer)
    state[name][index] = value
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state)
    assert_unchanged(layer, before)


def test_int8_and_float_states_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match=r"values has dtype torch.int8 but must be torch.float32 or"):
        sparse().load_state_dict(sparse("int8").state_dict(), strict=False)


@pytest.mark.parametrize("values", ["bfloat16", "float16"])
def test_half_state_into_float32_and_back(values: str) -> None:
    for assign, expected in ((False, torch.float32), (True, getattr(torch, values))):
        layer = sparse()
        layer.load_state_dict(sparse(values).state_dict(), assign=assign)
        assert layer.values.dtype == expected
        assert_same_bits(layer.to_dense(torch.float32), sparse(values).to_dense(torch.float32))


def test_float16_takes_no_value_that_it_cannot_hold() -> None:
    """Neither from a state, nor by a move; with ``assign=True`` values stay what they are."""
    state = sparse().state_dict()
    state["values"].view(-1)[5] = 1e5
    layer = sparse("float16", sparsity=0.2)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"values holds 100000, and float16 .*; nothing of this layer was"):
        layer.load_state_dict(state)
    assert_unchanged(layer, before)
    layer.load_state_dict(state, assign=True)
    assert layer.values.dtype == torch.float32
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"SparseLinear: values holds 100000, .*; use bfloat16 or float32"):
        layer.half()
    assert_unchanged(layer, before)
    assert layer.weight.dtype == torch.float32
    layer.bfloat16()
    with pytest.raises(ValueError, match="values holds 99840, and float16"):
        layer.to(torch.float16)
    original = linear()
    original.weight.data[3, 4] = torch.inf
    mask = torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="weight holds inf, and float16 values must be finite"):
        SparseLinear.from_mask(original, mask, (8, 4), torch.float16)
    mask[0, 1] = False
    SparseLinear.from_mask(original, mask, (8, 4), torch.float16)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: layer.col_indices.__setitem__(0, 1_000_000),
        lambda layer: layer.crow_indices.fill_(77),
        lambda layer: setattr(layer, "col_indices", layer.col_indices + 100),
        lambda layer: layer._apply(lambda t: t + 1 if t.dtype == torch.int32 else t),
    ],
)
def test_indices_that_somebody_changed_are_seen_before_a_kernel_reads(spoil: Any, values: Any) -> None:
    layer = sparse(values, block_shape=(8, 1))
    x = torch.randn(2, 20)
    layer(x)
    good = snapshot(layer)
    spoil(layer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(crow|col)_indices\[\d+\] is"):
            layer(x)
    layer.load_state_dict(good)
    assert_same_bits(layer(x), sparse(values, block_shape=(8, 1))(x))


# ------------------------------------------------------------------------------------------- moves and copies


@pytest.mark.parametrize(
    ("move", "floats"),
    [
        ("bfloat16", torch.bfloat16),
        ("float", torch.float32),
        ("half", torch.float16),
        ("double", None),
    ],
)
@pytest.mark.parametrize("values", VALUES)
def test_dtype_moves(values: Any, move: str, floats: torch.dtype | None) -> None:
    """float64, which no op takes, leaves the values as they are."""
    layer = sparse(values)
    before = snapshot(layer)
    getattr(layer, move)()
    dtype = {"float": torch.float32, "half": torch.float16, "double": torch.float64}.get(move, torch.bfloat16)
    assert layer.weight.dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    kept = getattr(torch, values)
    assert layer.values.dtype == (kept if values == "int8" or floats is None else floats)
    for name in ("crow_indices", "col_indices", "weight_scale"):
        if name in before:
            assert_same_bits(layer.state_dict()[name], before[name])
    if dtype != torch.float64:  # no op takes that
        assert layer(torch.randn(2, 20, dtype=dtype)).dtype == dtype
    fresh = SparseLinear(20, 18, block_shape=(8, 4), dtype=layer.values.dtype)
    fresh.load_state_dict(layer.state_dict())


def test_a_move_keeps_the_gradient() -> None:
    layer = sparse()
    layer(torch.randn(2, 20)).sum().backward()
    grad = layer.values.grad
    assert grad is not None
    before = grad.clone()
    layer.double()
    assert layer.values.grad is not None
    assert_same_bits(layer.values.grad, before)
    layer.half()
    assert layer.values.grad is not None
    assert_same_bits(layer.values.grad, before.half())


@pytest.mark.parametrize("values", VALUES)
def test_to_meta_and_to_empty_and_back(values: Any) -> None:
    layer = sparse(values)
    state = snapshot(layer)
    layer.to("meta")
    assert layer(torch.randn(3, 20, device="meta")).shape == (3, 18)
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert_same_layer(layer, sparse(values))
    layer.to_empty(device="cpu")
    layer.load_state_dict(state, assign=True)
    assert_same_layer(layer, sparse(values))


@pytest.mark.parametrize("values", VALUES)
def test_meta_construction(values: Any) -> None:
    layer = SparseLinear(4096, 4096, blocks=1000, dtype=getattr(torch, values), device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert layer(torch.randn(2, 4096, device="meta")).shape == (2, 4096)
    assert "blocks=1000" in repr(layer)


def copies(layer: SparseLinear) -> dict[str, SparseLinear]:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
    }


@pytest.mark.parametrize("values", VALUES)
def test_copies(values: Any) -> None:
    layer = sparse(values, act_fn="gelu")
    for name, twin in copies(layer).items():
        assert_same_layer(layer, twin)
        assert twin.values.data_ptr() != layer.values.data_ptr(), name
        assert isinstance(twin.values, nn.Parameter) is (values != "int8")


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (sparse(), "in_features=20, out_features=18, bias=True, block_shape=(8, 4), density=0.5111"),
        (
            sparse("int8", (4, 4), 0.0, act_fn="silu", bias=False),
            "in_features=20, out_features=18, bias=False, block_shape=(4, 4), density=1, dtype=torch.int8, "
            "act_fn='silu'",
        ),
    ],
)
def test_repr(layer: SparseLinear, text: str) -> None:
    assert repr(layer) == f"SparseLinear({text})"


@pytest.mark.parametrize("values", VALUES)
def test_compiled_and_exported(values: Any) -> None:
    layer = sparse(values, act_fn="relu").eval()
    x = torch.randn(3, 20)
    with torch.no_grad():
        y = layer(x)
        assert_same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
        assert_same_bits(torch.export.export(layer, (x,)).module()(x), y)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = sparse("int8")
        x = torch.randn(2, 20)
        assert_same_bits(layer(x), layer(x))
    assert layer(x).shape == (2, 18)


def test_functional_call_checks_the_indices_that_it_brings() -> None:
    layer, x = sparse(), torch.randn(2, 20)
    state = snapshot(layer)
    assert_same_bits(torch.func.functional_call(layer, state, (x,)), layer(x).detach())
    state["col_indices"][0] = 99
    with pytest.raises(ValueError, match=r"col_indices\[0\] is 99"):
        torch.func.functional_call(layer, state, (x,))
    layer(x)


# ------------------------------------------------------------------------------------------- training


class Masked(nn.Module):
    """The dense counterpart: a weight that is multiplied by a mask."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.to_dense().detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())  # type: ignore[union-attr]
        ones = replace(layer.sparse, values=torch.ones_like(layer.sparse.values))
        self.mask = formats.block_sparse_to_dense(BlockSparseWeights(**vars(ones)))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.weight * self.mask, self.bias))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("block_shape", [(8, 1), (16, 16), (3, 5)], ids=str)
def test_training_is_that_of_a_masked_dense_layer(block_shape: Any, optimizer: Any) -> None:
    layer = sparse(block_shape=block_shape, act_fn="gelu")
    dense = Masked(layer)
    x, target = torch.randn(64, 20), torch.randn(64, 18)
    losses: list[list[float]] = []
    for model in (layer, dense):
        steps = optimizer(model.parameters())
        losses.append([])
        for _ in range(30):
            steps.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            steps.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.97 * losses[0][0]
    # 30 steps of two float32 sums in different order; AdamW divides by small gradients.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.to_dense(), dense.weight * dense.mask, rtol=1e-2, atol=2e-3)
    formats.check_block_sparse(layer.sparse)  # padding is still zero


@pytest.mark.parametrize("values", ["bfloat16", "float16"])
def test_half_values_train(values: str) -> None:
    dtype = getattr(torch, values)
    layer = sparse(values).to(dtype)
    x, target = torch.randn(64, 20).to(dtype), torch.randn(64, 18).to(dtype)
    steps = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    losses = []
    for _ in range(20):
        steps.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_int8_passes_gradients_on() -> None:
    layer = sparse("int8")
    x = torch.randn(3, 20, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.to_dense().sum(0).expand(3, 20), rtol=1e-4, atol=1e-5)
    assert layer.bias is not None
    assert layer.bias.grad is not None
