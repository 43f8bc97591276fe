"""``Int8Linear`` and ``Int8Embedding``: drop-in behaviour, state, moves, copies, files, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lissom import Int8, formats
from lissom.nn import Int8Embedding, Int8Linear
from lissom.reference import int8_embedding as embedding_page
from lissom.reference import int8_linear as linear_page
from lissom.testing import ACT_FNS, DTYPES, LINEAR_CASES, LinearCase, assert_same_bits

MODES = ("dynamic", "static", None)


def linear(k: int = 20, n: int = 18, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(k * 100 + n)
    return nn.Linear(k, n, bias=bias).to(dtype)


def int8_linear(mode: Any = "dynamic", act_fn: str | None = None, **options: Any) -> Int8Linear:
    scale = 0.02 if mode == "static" else None
    return Int8Linear.from_linear(linear(**options), Int8(activation=mode), input_scale=scale, act_fn=act_fn)


def embedding(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(7)
    return nn.Embedding(11, 21, padding_idx=3).to(dtype)


def assert_same_layer(a: nn.Module, b: nn.Module) -> None:
    """Same class, settings, state and outputs, and no shared storage in what is compared."""
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    state_a, state_b = a.state_dict(), b.state_dict()
    assert list(state_a) == list(state_b)
    for name in state_a:
        assert_same_bits(state_a[name], state_b[name])
    x = torch.tensor([0, 10, 3]) if isinstance(a, Int8Embedding) else torch.randn(3, a.in_features)
    assert_same_bits(a(x), b(x))


# ------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_linear_is_the_op_on_quantized_weights(mode: str, bias: bool, act_fn: str | None) -> None:
    original = linear(bias=bias)
    scale = torch.tensor(0.02) if mode == "static" else None
    layer = Int8Linear.from_linear(original, Int8(activation=mode), input_scale=scale, act_fn=act_fn)
    x = torch.randn(5, 20)
    q, s = formats.quantize_int8(original.weight)
    assert_same_bits(layer(x), linear_page.int8_linear(x, q, s, original.bias, scale, False, act_fn))


def test_weight_only_linear_is_close_to_its_dequantized_self() -> None:
    layer = int8_linear(None)
    x = torch.randn(5, 20)
    # Two float32 sums of 20 terms of size about one: K * 2^-24 each, with room for the activations' size.
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_linear_in_every_dtype(mode: Any, dtype: torch.dtype) -> None:
    original = linear(dtype=dtype)
    layer = Int8Linear.from_linear(
        original, Int8(activation=mode), input_scale=0.02 if mode == "static" else None
    )
    x = torch.randn(2, 3, 20).to(dtype)
    y = layer(x).detach()
    assert y.dtype == dtype
    assert y.shape == (2, 3, 18)
    assert layer.weight.dtype == dtype
    expected = original(x).detach().float()
    assert float((y.float() - expected).norm() / expected.norm()) < 0.02  # int8 rounding: about one percent


@pytest.mark.parametrize("case", LINEAR_CASES[:12], ids=str)
def test_linear_of_any_shape(case: LinearCase) -> None:
    empty = 0 in (case.k, case.n)
    layer = Int8Linear(case.k, case.n) if empty else int8_linear(k=case.k, n=case.n)
    y = layer(torch.randn(case.m, case.k))
    assert y.shape == (case.m, case.n)
    assert layer.weight.shape == (case.n, case.k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_the_op_on_a_quantized_table(dtype: torch.dtype) -> None:
    original = embedding(dtype)
    layer = Int8Embedding.from_embedding(original)
    indices = torch.tensor([[0, 10], [3, 3]])
    q, s = formats.quantize_int8(original.weight)
    y = layer(indices)
    assert y.dtype == dtype
    assert_same_bits(y, embedding_page.int8_embedding(indices.view(-1), q, s, dtype).view(2, 2, 21))
    assert not bool(y[1].any()), "the padding row is zero"
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (11, 21, 3)


# ------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_from_linear_leaves_the_original_unchanged(mode: Any, training: bool) -> None:
    original = linear().train(training)
    before = copy.deepcopy(original.state_dict())
    layer = Int8Linear.from_linear(
        original, Int8(activation=mode), input_scale=0.1 if mode == "static" else None
    )
    assert layer.training is training
    assert layer.bias is original.bias, "the bias parameter is taken over, not copied"
    assert (layer.in_features, layer.out_features) == (20, 18)
    assert original.weight.requires_grad
    for name, value in original.state_dict().items():
        assert_same_bits(value, before[name])
    assert type(original) is nn.Linear
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_from_linear_without_bias() -> None:
    layer = int8_linear(bias=False)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["qweight", "weight_scale"]
    assert not list(layer.parameters())


def test_from_embedding_leaves_the_original_unchanged() -> None:
    original = embedding().eval()
    before = original.weight.detach().clone()
    layer = Int8Embedding.from_embedding(original)
    assert not layer.training
    assert_same_bits(original.weight, before)
    assert not list(layer.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_cannot_be_quantized(bad: float) -> None:
    broken = linear()
    with torch.no_grad():
        broken.weight[4, 2] = bad
    with pytest.raises(ValueError, match="weight row 4 holds NaN or infinity"):
        Int8Linear.from_linear(broken)
    table = embedding()
    with torch.no_grad():
        table.weight[9, 0] = bad
    with pytest.raises(ValueError, match="weight row 9 holds NaN or infinity"):
        Int8Embedding.from_embedding(table)


def test_meta_layers_cannot_be_converted() -> None:
    with pytest.raises(
        ValueError, match=r"Int8Linear\.from_linear: the layer is on the meta device; load its"
    ):
        Int8Linear.from_linear(nn.Linear(3, 4, device="meta"))
    with pytest.raises(
        ValueError, match=r"Int8Embedding\.from_embedding: the layer is on the meta device; load"
    ):
        Int8Embedding.from_embedding(nn.Embedding(3, 4, device="meta"))


def test_input_scale_and_activation_go_together() -> None:
    with pytest.raises(ValueError, match=r"activation='static' with input_scale=None; give input_scale"):
        Int8Linear.from_linear(linear(), Int8(activation="static"))
    with pytest.raises(ValueError, match=r"activation='dynamic' with input_scale=0\.5; give input_scale"):
        Int8Linear.from_linear(linear(), input_scale=0.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_useless_input_scales(scale: float) -> None:
    with pytest.raises(ValueError, match=r"input_scale=\S+ must be positive and finite"):
        Int8Linear.from_linear(linear(), Int8(activation="static"), input_scale=scale)


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"Int8Linear: activation='int4'; use 'dynamic', 'static' or None"):
        Int8Linear(3, 4, activation="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Int8Linear: act_fn='tanh' is unknown; use one of \('relu'"):
        Int8Linear(3, 4, act_fn="tanh")
    with pytest.raises(ValueError, match=r"Int8Linear: act_fn='tanh' is unknown"):
        Int8Linear.from_linear(linear(), act_fn="tanh")
    too_many = formats.INT8_MAX_IN_FEATURES + 1
    with pytest.raises(ValueError, match=rf"in_features={too_many} could overflow .* use activation=None"):
        Int8Linear(too_many, 1)
    assert Int8Linear(too_many, 1, activation=None)(torch.zeros(1, too_many)).shape == (1, 1)


def test_embedding_that_renormalizes() -> None:
    with pytest.raises(
        ValueError, match=r"max_norm=1\.0 changes the table on look-up; set embedding\.max_norm"
    ):
        Int8Embedding.from_embedding(nn.Embedding(3, 4, max_norm=1.0))


# ------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_is_canonical(mode: Any) -> None:
    layer = int8_linear(mode)
    state = layer.state_dict()
    found = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    expected = {
        "qweight": ((18, 20), torch.int8),
        "weight_scale": ((18,), torch.float32),
        "bias": ((18,), torch.float32),
    }
    if mode == "static":
        expected["input_scale"] = ((), torch.float32)
    assert found == expected
    assert all(type(t) is torch.Tensor for t in state.values())
    q, s = formats.quantize_int8(linear().weight)
    assert_same_bits(state["qweight"], q)
    assert_same_bits(state["weight_scale"], s)


def test_embedding_state_dict_is_canonical() -> None:
    state = Int8Embedding.from_embedding(embedding()).state_dict()
    found = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    assert found == {"qweight": ((11, 21), torch.int8), "weight_scale": ((11,), torch.float32)}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", MODES)
def test_strict_load(mode: Any, device: str, assign: bool) -> None:
    source = int8_linear(mode)
    target = Int8Linear(20, 18, activation=mode, device=device)
    if device == "meta" and not assign:
        target = target.to_empty(device="cpu")
    state = {name: t.clone() for name, t in source.state_dict().items()}
    assert str(target.load_state_dict(state, strict=True, assign=assign)) == "<All keys matched successfully>"
    assert_same_layer(target, source)
    if assign:
        assert target.qweight is state["qweight"] or target.qweight.data_ptr() == state["qweight"].data_ptr()
    assert_same_layer(target.to("cpu"), source)
    assert_same_layer(copy.deepcopy(target), source)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_strict_load_of_an_embedding(device: str, assign: bool) -> None:
    source = Int8Embedding.from_embedding(embedding())
    target = Int8Embedding(11, 21, 3, device=device)
    if device == "meta" and not assign:
        target = target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert_same_layer(target, source)
    assert_same_layer(target.to("cpu"), source)


def test_loading_again_replaces_the_packed_weights() -> None:
    """The cache follows the state: an old packed form would answer with the old weights."""
    layer = int8_linear()
    other = Int8Linear.from_linear(nn.Linear(20, 18))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 20)
    assert_same_bits(layer(x), other(x))


@pytest.mark.parametrize(("name", "wrong"), [("qweight", torch.uint8), ("weight_scale", torch.float16)])
@pytest.mark.parametrize("assign", [False, True])
def test_wrong_dtype_in_a_state_dict_is_refused(name: str, wrong: torch.dtype, assign: bool) -> None:
    for source, target in (
        (int8_linear(), Int8Linear(20, 18)),
        (Int8Embedding.from_embedding(embedding()), Int8Embedding(11, 21, 3)),
    ):
        before = copy.deepcopy(target.state_dict())
        state = source.state_dict()
        right = state[name].dtype
        state[name] = state[name].to(wrong)
        with pytest.raises(
            RuntimeError, match=rf"{name} has dtype {wrong} but must be {right}; it was not loaded"
        ):
            target.load_state_dict(state, assign=assign)
        for key, value in target.state_dict().items():
            assert_same_bits(value, before[key])


@pytest.mark.parametrize("assign", [False, True])
def test_other_faulty_state_dicts_are_refused(assign: bool) -> None:
    state = int8_linear().state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"input_scale\""):
        Int8Linear(20, 18).load_state_dict({**state, "input_scale": torch.ones(())}, assign=assign)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"input_scale\""):
        Int8Linear(20, 18, activation="static").load_state_dict(state, assign=assign)
    with pytest.raises(RuntimeError, match=r"size mismatch for qweight"):
        Int8Linear(20, 17).load_state_dict(state, assign=assign)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight_scale\""):
        Int8Linear(20, 18).load_state_dict(
            {k: v for k, v in state.items() if k != "weight_scale"}, assign=assign
        )


def test_in_a_model_with_prefixes() -> None:
    model = nn.Sequential(Int8Embedding.from_embedding(embedding()), nn.LayerNorm(21), int8_linear(k=21))
    names = list(model.state_dict())
    assert names == [
        "0.qweight",
        "0.weight_scale",
        "1.weight",
        "1.bias",
        "2.bias",
        "2.qweight",
        "2.weight_scale",
    ]
    twin = nn.Sequential(Int8Embedding(11, 21, 3), nn.LayerNorm(21), Int8Linear(21, 18))
    twin.load_state_dict(model.state_dict())
    indices = torch.tensor([1, 2])
    assert_same_bits(twin(indices), model(indices))
    with pytest.raises(RuntimeError, match=r"2\.qweight has dtype torch\.float32 but must be torch\.int8"):
        twin.load_state_dict({**model.state_dict(), "2.qweight": torch.zeros(18, 21)})


# ------------------------------------------------------------------------------------------- moves and copies


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("move", ["half", "bfloat16", "to", "double_to"])
def test_dtype_moves_keep_scales_float32(mode: Any, move: str) -> None:
    layer = int8_linear(mode)
    before = copy.deepcopy(layer)
    dtype = torch.bfloat16 if move == "bfloat16" else torch.float16
    if move == "double_to":
        layer = nn.Sequential(layer).to(torch.bfloat16).to(dtype)[0]
    else:
        layer = layer.to(dtype) if move == "to" else getattr(layer, move)()
    assert layer.qweight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float32
    assert_same_bits(layer.weight_scale, before.weight_scale)
    if mode == "static":
        assert layer.input_scale.dtype == torch.float32
        assert_same_bits(layer.input_scale, before.input_scale)
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == dtype
    y = layer(torch.randn(2, 20, dtype=dtype))
    assert y.dtype == dtype
    back = layer.float()
    assert_same_bits(back.weight, before.weight)


def test_embedding_follows_dtype_moves() -> None:
    layer = Int8Embedding.from_embedding(embedding())
    scale = layer.weight_scale.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer = layer.to(dtype)
        assert layer(torch.tensor([1])).dtype == layer.weight.dtype == dtype
        assert_same_bits(layer.weight_scale, scale)


def test_to_meta_and_to_empty_and_back() -> None:
    for layer in (int8_linear(), Int8Embedding.from_embedding(embedding())):
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        twin = copy.deepcopy(layer)
        layer.to("meta")
        assert all(t.is_meta for t in [*layer.state_dict().values(), *layer.buffers()])
        layer.to_empty(device="cpu").load_state_dict(state)
        assert_same_layer(layer, twin)


@pytest.mark.parametrize("mode", MODES)
def test_meta_construction_allocates_nothing_and_answers_with_shapes(mode: Any) -> None:
    layer = Int8Linear(4096, 30000, activation=mode, device="meta", dtype=torch.bfloat16)
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    y = layer(torch.empty(2, 7, 4096, device="meta", dtype=torch.bfloat16))
    assert y.is_meta
    assert y.shape == (2, 7, 30000)
    assert y.dtype == torch.bfloat16
    table = Int8Embedding(100000, 4096, device="meta", dtype=torch.float16)
    z = table(torch.empty(3, dtype=torch.int64, device="meta"))
    assert z.is_meta
    assert z.shape == (3, 4096)
    assert z.dtype == torch.float16
    with torch.device("meta"):
        assert Int8Linear(3, 4).qweight.is_meta


def test_meta_layer_does_not_answer_real_input() -> None:
    with pytest.raises(ValueError, match="int8_linear: qweight is on meta but the input is on cpu"):
        Int8Linear(3, 4, device="meta")(torch.ones(1, 3))
    with pytest.raises(ValueError, match="int8_embedding: qweight is on meta but the input is on cpu"):
        Int8Embedding(3, 4, device="meta")(torch.tensor([1]))


def copies(layer: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("act_fn", [None, "gelu"])
@pytest.mark.parametrize("mode", MODES)
def test_copies(mode: Any, act_fn: str | None) -> None:
    for make in (lambda: int8_linear(mode, act_fn), lambda: Int8Embedding.from_embedding(embedding())):
        layer = make()
        for name, twin in copies(layer).items():
            assert_same_layer(twin, layer)
            for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
                assert a.data_ptr() != b.data_ptr() or a.numel() == 0, f"{name} shares storage"


def test_state_dict_through_a_file() -> None:
    layer = int8_linear("static", "silu")
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = Int8Linear(20, 18, activation="static", act_fn="silu")
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_layer(twin, layer)


def test_weight_is_a_new_tensor_each_time() -> None:
    for layer in (int8_linear(), Int8Embedding.from_embedding(embedding())):
        first = layer.weight
        first.zero_()
        assert bool(layer.weight.any())
        assert not layer.weight.requires_grad


# ------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: Int8Linear(3, 4),
            "Int8Linear(in_features=3, out_features=4, bias=True, activation='dynamic')",
        ),
        (
            lambda: Int8Linear(3, 4, bias=False, activation=None, act_fn="gelu"),
            "Int8Linear(in_features=3, out_features=4, bias=False, activation=None, act_fn='gelu')",
        ),
        (lambda: Int8Embedding(5, 6), "Int8Embedding(5, 6)"),
        (lambda: Int8Embedding(5, 6, padding_idx=2), "Int8Embedding(5, 6, padding_idx=2)"),
    ],
)
def test_repr(layer: Any, text: str) -> None:
    assert repr(layer()) == text


def test_training_through_the_layer() -> None:
    """Gradients reach what is below and the bias; the int8 weights are no parameters."""
    below = nn.Linear(20, 20)
    layer = int8_linear("dynamic", "gelu")
    layer(below(torch.randn(4, 20))).square().sum().backward()
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert float(layer.bias.grad.abs().sum()) > 0
    assert below.weight.grad is not None
    assert float(below.weight.grad.abs().sum()) > 0


def test_under_autocast_between_float_layers() -> None:
    model = nn.Sequential(nn.Linear(20, 20), int8_linear(), nn.Linear(18, 5))
    x = torch.randn(3, 20)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    # bfloat16 has 8 significant bits; three layers of them.
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("shape", "text"), [((2, 19), r"x has shape \(2, 19\) but qweight is \[N=18, K=20\]")]
)
def test_wrong_input_shape(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        int8_linear()(torch.ones(shape))


def test_static_scale_can_be_set_in_place() -> None:
    layer = int8_linear("static")
    x = torch.randn(2, 20)
    assert layer.input_scale is not None
    layer.input_scale.fill_(0.5)
    expected = linear_page.int8_linear(x, layer.qweight, layer.weight_scale, layer.bias, torch.tensor(0.5))
    assert_same_bits(layer(x), expected)


@pytest.mark.parametrize("how", ["context", "default"])
def test_another_default_device_does_not_matter(how: str) -> None:
    """Under ``torch.device("meta")`` plain factories give tensors without memory: not for kernels."""
    original, x, indices = linear(), torch.randn(3, 20), torch.tensor([0, 3])
    expected = Int8Linear.from_linear(original, Int8(activation="static"), input_scale=0.02)
    table = Int8Embedding.from_embedding(embedding())
    before = torch.get_default_device()
    try:
        if how == "default":
            torch.set_default_device("meta")
        with torch.device("meta"):
            layer = Int8Linear.from_linear(original, Int8(activation="static"), input_scale=0.02)
            fresh = Int8Linear(20, 18, activation="static", device="cpu")
            fresh.load_state_dict(layer.state_dict())
            moved = copy.deepcopy(layer).to("cpu")
            outputs = [m(x) for m in (layer, fresh, moved)]
            rows = table(indices)
    finally:
        torch.set_default_device(before)
    for y in outputs:
        assert_same_bits(y, expected(x))
    assert_same_bits(rows, table(indices))
