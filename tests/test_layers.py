"""The quantized layers: drop-in behaviour, state, moves, copies, files, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lissom import Int4, Int8, formats
from lissom.nn import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear
from lissom.reference import int4_embedding as int4_embedding_page
from lissom.reference import int4_linear as int4_linear_page
from lissom.reference import int8_embedding as embedding_page
from lissom.reference import int8_linear as linear_page
from lissom.testing import (
    ACT_FNS,
    DTYPES,
    INT4_FORMS,
    LINEAR_CASES,
    Int4Form,
    LinearCase,
    assert_same_bits,
    int4_weights,
)

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
    x = (
        torch.tensor([0, 10, 3])
        if isinstance(a, Int8Embedding | Int4Embedding)
        else torch.randn(3, a.in_features)
    )
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


# ------------------------------------------------------------------------------------------- int4

UNIFORM_FORMS = [form for form in INT4_FORMS if form.codebook is None and not form.group_index]
INT4_CONFIGS = {
    "default": Int4(),
    "rtn symmetric g32": Int4(group_size=32, symmetric=True, method="rtn"),
    "mse row": Int4(group_size=-1, method="mse"),
    "nf4": Int4(codebook="nf4", group_size=64),
    "kmeans": Int4(codebook="kmeans"),
    "kmeans group": Int4(codebook="kmeans", codebook_scope="group"),
    "rotated": Int4(rotation=True),
    "weight-only": Int4(activation=None),
}


def int4_linear(form: Int4Form, act_fn: str | None = None, **options: Any) -> Int4Linear:
    bias = nn.Parameter(torch.linspace(-1, 1, 18))
    return Int4Linear.from_weights(int4_weights(18, 71, form), bias, act_fn=act_fn, **options)


def int4_embedding(form: Int4Form = UNIFORM_FORMS[1]) -> Int4Embedding:
    layer = Int4Embedding(**embedding_options(form))
    table = int4_weights(11, 71, form)
    tensors = {name: getattr(table, name) for name in layer.state_dict()}
    layer.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
    return layer


def embedding_options(form: Int4Form, **others: Any) -> dict[str, Any]:
    zero = {} if form.zero is None else {"zero_dtype": form.zero}
    return {
        "num_embeddings": 11,
        "embedding_dim": 71,
        "group_size": form.group_size,
        "symmetric": form.zero is None,
        "scale_dtype": form.scale,
        **zero,
        **others,
    }


def linear_options(form: Int4Form, **others: Any) -> dict[str, Any]:
    """Arguments of a fresh layer like ``int4_linear(form)``."""
    zero = {} if form.zero is None else {"zero_dtype": form.zero}
    return {
        "in_features": 71,
        "out_features": 18,
        "group_size": form.group_size,
        "symmetric": form.zero is None,
        "codebook": form.codebook,
        "group_index": form.group_index,
        "scale_dtype": form.scale,
        **zero,
        **others,
    }


@pytest.mark.parametrize("act_fn", [None, "gelu"])
@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4_linear_is_the_op_on_its_weights(form: Int4Form, act_fn: str | None) -> None:
    layer = int4_linear(form, act_fn)
    x = torch.randn(5, 71)
    weights = int4_weights(18, 71, form)
    assert_same_bits(layer(x), int4_linear_page.int4_linear(x, weights, layer.bias, False, act_fn))
    if not form.group_index:
        rotated = int4_linear(form, act_fn, rotated=True)
        expected = int4_linear_page.int4_linear(x, weights, layer.bias, False, act_fn, True)
        assert_same_bits(rotated(x), expected)
    only = int4_linear(form, act_fn, activation=None)
    # Two float32 sums of 71 terms in different orders.
    expected = int4_linear_page.int4_linear(x, weights, layer.bias, True, act_fn)
    torch.testing.assert_close(only(x), expected, rtol=1e-5, atol=1e-4)
    assert_same_bits(layer.weight, formats.dequantize_int4(weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", UNIFORM_FORMS, ids=str)
def test_int4_embedding_is_the_op_on_its_table(form: Int4Form, dtype: torch.dtype) -> None:
    layer = int4_embedding(form).to(dtype)
    indices = torch.tensor([[0, 10], [3, 3]])
    y = layer(indices)
    assert y.dtype == layer.weight.dtype == dtype
    table = int4_weights(11, 71, form)
    assert_same_bits(y, int4_embedding_page.int4_embedding(indices.view(-1), table, dtype).view(2, 2, 71))
    assert_same_bits(layer.weight, formats.dequantize_int4(table, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INT4_CONFIGS)
def test_int4_from_linear(name: str, dtype: torch.dtype) -> None:
    config = INT4_CONFIGS[name]
    original = linear(k=300, n=40, dtype=dtype).train(dtype == torch.float32)
    before = copy.deepcopy(original.state_dict())
    layer = Int4Linear.from_linear(original, config, act_fn="relu")
    assert layer.bias is original.bias, "the bias parameter is taken over, not copied"
    assert layer.training is original.training
    assert (layer.in_features, layer.out_features, layer.group_size) == (300, 40, config.group_size)
    assert (layer.activation, layer.act_fn) == (config.activation, "relu")
    assert layer.rotated is bool(config.rotation)
    assert layer.codebook_scope == config.codebook_scope
    assert (layer.zero_point is None) == (config.symmetric or config.codebook is not None)
    for key, value in original.state_dict().items():
        assert_same_bits(value, before[key])
    assert original.weight.requires_grad
    assert layer.weight.dtype == dtype
    x = torch.randn(2, 3, 300).to(dtype)
    y, expected = layer(x).detach().float(), original(x).relu().detach().float()
    assert y.shape == (2, 3, 40)
    # 16 levels: 6 % for evenly distributed weights; 10 % for normal ones, which a rotation makes of them.
    assert float((y - expected).norm() / expected.norm()) < 0.15
    exact = original.weight.detach().float()
    assert float((layer.weight.float() - exact).norm() / exact.norm()) < 0.15


def test_int4_from_embedding() -> None:
    original = nn.Embedding(11, 71, padding_idx=3).eval()
    before = original.weight.detach().clone()
    for config in (
        None,
        Int4(group_size=32, symmetric=True),
        Int4(codebook="kmeans", codebook_scope="group"),
    ):
        layer = Int4Embedding.from_embedding(original, config)
        assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (11, 71, 3)
        assert not layer.training
        assert not list(layer.parameters())
        assert_same_bits(original.weight, before)
        y = layer(torch.arange(11))
        assert not bool(y[3].any()), "the padding row is zero"
        assert float((y - before).norm() / before.norm()) < 0.15


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_int4_cannot_take(bad: float) -> None:
    broken = linear()
    table = embedding()
    with torch.no_grad():
        broken.weight[4, 2] = bad
        table.weight[9, 0] = bad
    with pytest.raises(ValueError, match="row 4 holds NaN or infinity"):
        Int4Linear.from_linear(broken)
    with pytest.raises(ValueError, match="row 9 holds NaN or infinity"):
        Int4Embedding.from_embedding(table)
    with pytest.raises(
        ValueError, match=r"Int4Linear\.from_linear: the layer is on the meta device; load its"
    ):
        Int4Linear.from_linear(nn.Linear(3, 4, device="meta"))
    with pytest.raises(ValueError, match=r"Int4Embedding\.from_embedding: the layer is on the meta device"):
        Int4Embedding.from_embedding(nn.Embedding(3, 4, device="meta"))
    with pytest.raises(ValueError, match=r"max_norm=1\.0 changes the table on look-up"):
        Int4Embedding.from_embedding(nn.Embedding(3, 4, max_norm=1.0))


def test_int4_from_weights_checks_and_takes_over() -> None:
    weights = int4_weights(18, 71, INT4_FORMS[1])
    layer = Int4Linear.from_weights(weights, torch.zeros(18, dtype=torch.bfloat16))
    for name in ("qweight", "weight_scale", "zero_point"):
        assert getattr(layer, name) is getattr(weights, name) is getattr(layer.quantized, name)
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.weight.dtype == torch.bfloat16
    assert Int4Linear.from_weights(weights).weight.dtype == torch.float32
    assert Int4Linear.from_weights(weights, dtype=torch.float16).weight.dtype == torch.float16
    with pytest.raises(
        ValueError, match=r"Int4Linear\.from_weights: bias must be floating point \[18\], got"
    ):
        Int4Linear.from_weights(weights, torch.zeros(17))
    with pytest.raises(ValueError, match=r"Int4Linear\.from_weights: weight_scale must be .*\[18, 3\]"):
        Int4Linear.from_weights(replace(weights, group_size=32))
    scale = weights.weight_scale.clone()
    scale[2, 0] = torch.inf
    with pytest.raises(
        ValueError, match=r"from_weights: weight_scale holds inf at \[2, 0\]; all must be finite"
    ):
        Int4Linear.from_weights(replace(weights, weight_scale=scale))
    with pytest.raises(ValueError, match=r"Int4Linear: rotated=True has no use with activation=None"):
        Int4Linear.from_weights(weights, activation=None, rotated=True)
    with pytest.raises(ValueError, match=r"from_weights: the layer is on the meta device"):
        Int4Linear.from_weights(replace(weights, qweight=weights.qweight.to("meta")))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_size": 100}, r"group_size=100 cannot be; use one of 32, 64, 128, -1"),
        ({"codebook": "nf4"}, r"codebook='nf4' cannot be; use one of None, 'tensor', 'channel', 'group'"),
        (
            {"codebook": "group", "symmetric": False},
            r"symmetric=False has no meaning with a codebook; give one",
        ),
        ({"group_index": True, "group_size": -1}, r"group_index=True has no meaning with group_size=-1"),
        ({"group_index": True, "rotated": True}, r"group_index=True cannot go with rotated=True"),
        ({"activation": "static"}, r"activation='static' cannot be; use one of 'int8', None"),
        ({"activation": None, "rotated": True}, r"rotated=True has no use with activation=None"),
        ({"act_fn": "tanh"}, r"act_fn='tanh' is unknown; use one of \('relu'"),
        ({"scale_dtype": torch.float64}, r"scale_dtype=torch\.float64 cannot be; use one of torch\.float16"),
        ({"zero_dtype": torch.int8}, r"zero_dtype=torch\.int8 cannot be; use one of torch\.uint8"),
    ],
    ids=str,
)
def test_int4_options_are_checked_at_construction(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"Int4Linear: {text}"):
        Int4Linear(3, 4, **options)


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4_state_dict_is_canonical(form: Int4Form) -> None:
    groups = formats.int4_groups(71, form.group_size)
    expected: dict[str, Any] = {
        "bias": ((18,), torch.float32),
        "qweight": ((18, 36), torch.uint8),
        "weight_scale": ((18, groups), form.scale),
    }
    if form.zero is not None:
        expected["zero_point"] = ((18, groups), form.zero)
    if form.codebook is not None:
        shape = {"tensor": (16,), "channel": (18, 16), "group": (18, groups, 16)}[form.codebook]
        expected["codebook"] = (shape, torch.float32)
    if form.group_index:
        expected["group_index"] = ((71,), torch.int32)
    for layer in (int4_linear(form), Int4Linear(**linear_options(form))):
        found = {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()}
        assert found == expected


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4_strict_load(form: Int4Form, device: str, assign: bool) -> None:
    sources: list[tuple[Any, Any]] = [(int4_linear(form), Int4Linear(**linear_options(form, device=device)))]
    if form in UNIFORM_FORMS:
        sources.append((int4_embedding(form), Int4Embedding(**embedding_options(form, device=device))))
    for source, target in sources:
        if device == "meta" and not assign:
            target = target.to_empty(device="cpu")
        state = {name: t.clone() for name, t in source.state_dict().items()}
        target.load_state_dict(state, strict=True, assign=assign)
        assert_same_layer(target, source)
        if assign:
            assert target.qweight.data_ptr() == state["qweight"].data_ptr()
        assert_same_layer(target.to("cpu"), source)
        assert_same_layer(copy.deepcopy(target), source)


def test_loading_int4_again_replaces_the_packed_weights() -> None:
    for form in INT4_FORMS:
        layer = int4_linear(form)
        other = Int4Linear.from_weights(int4_weights(18, 71, form, seed=9), nn.Parameter(torch.zeros(18)))
        layer.load_state_dict(other.state_dict())
        assert_same_layer(layer, other)


@pytest.mark.parametrize("assign", [False, True])
def test_another_legal_dtype_of_scales_and_zero_points_is_adopted(assign: bool) -> None:
    source = int4_linear(Int4Form(32, torch.float16, scale=torch.float32))
    embedded = int4_embedding(Int4Form(32, torch.float16, scale=torch.float32))
    for layer, options, cls in (
        (source, linear_options(Int4Form(32, torch.uint8)), Int4Linear),
        (embedded, embedding_options(Int4Form(32, torch.uint8)), Int4Embedding),
    ):
        target = cls(**options)
        target.load_state_dict(layer.state_dict(), assign=assign)
        assert_same_layer(target, layer)
        moved = copy.deepcopy(target).half().float()
        for name in ("qweight", "weight_scale", "zero_point"):
            assert_same_bits(getattr(moved, name), getattr(layer, name))


@pytest.mark.parametrize(
    ("form", "name", "wrong"),
    [
        (INT4_FORMS[1], "qweight", torch.int8),
        (INT4_FORMS[1], "weight_scale", torch.float64),
        (INT4_FORMS[1], "zero_point", torch.int32),
        (INT4_FORMS[2], "codebook", torch.float16),
        (INT4_FORMS[13], "group_index", torch.int64),
    ],
    ids=str,
)
@pytest.mark.parametrize("assign", [False, True])
def test_wrong_dtype_in_an_int4_state_is_refused(
    form: Int4Form, name: str, wrong: torch.dtype, assign: bool
) -> None:
    target = Int4Linear(**linear_options(form))
    before = copy.deepcopy(target.state_dict())
    state = int4_linear(form).state_dict()
    state[name] = state[name].to(wrong)
    with pytest.raises(
        RuntimeError, match=rf"{name} has dtype {wrong} but must be torch\.\S+.*; it was not loaded"
    ):
        target.load_state_dict(state, assign=assign)
    for key, value in target.state_dict().items():
        assert_same_bits(value, before[key])


@pytest.mark.parametrize(
    ("form", "name", "value", "text"),
    [
        (INT4_FORMS[1], "weight_scale", torch.nan, r"weight_scale holds nan at \[0, 0\]; all must be finite"),
        (INT4_FORMS[4], "zero_point", torch.inf, r"zero_point holds inf at \[0, 0\]"),
        (INT4_FORMS[2], "codebook", torch.nan, r"codebook holds nan at \[0, 0\]"),
        (INT4_FORMS[13], "group_index", 9, r"group_index holds 9; use 0 to 0"),
        (INT4_FORMS[15], "group_index", 0, r"group_index puts 71 columns into group 0, which must have 32"),
        (INT4_FORMS[0], "qweight", 0x11, r"qweight has a code in the last high nibble, past K=71"),
    ],
    ids=str,
)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "0."])
def test_faulty_values_in_an_int4_state_are_refused(
    form: Int4Form, name: str, value: float, text: str, assign: bool, prefix: str
) -> None:
    layer = int4_linear(form)
    target = nn.Sequential(layer) if prefix else layer
    before, x = copy.deepcopy(target.state_dict()), torch.randn(2, 71)
    expected = target(x)
    state = {prefix + key: tensor.clone() for key, tensor in int4_linear(form).state_dict().items()}
    state[prefix + name].fill_(value)
    where = "0" if prefix else "Int4Linear"
    with pytest.raises(RuntimeError, match=rf"\s{where}: {text}.*; nothing of this layer was loaded"):
        target.load_state_dict(state, assign=assign)
    for key, tensor in target.state_dict().items():
        assert_same_bits(tensor, before[key])
    assert_same_bits(target(x), expected)


def test_other_faulty_int4_states_are_refused() -> None:
    state = int4_linear(INT4_FORMS[1]).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"zero_point\""):
        Int4Linear(**linear_options(INT4_FORMS[0])).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"codebook\""):
        Int4Linear(**linear_options(INT4_FORMS[2])).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_scale"):
        Int4Linear(**linear_options(INT4_FORMS[7])).load_state_dict(state)


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_dtype_moves_leave_the_int4_state_alone(form: Int4Form, move: str) -> None:
    layer = int4_linear(form)
    before = copy.deepcopy(layer)
    getattr(layer, move)()
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert_same_bits(tensor, before.state_dict()[name])
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}.get(
        move, torch.float32
    )
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == dtype
    if dtype in DTYPES:
        assert layer(torch.randn(2, 71, dtype=dtype)).dtype == dtype
    assert_same_bits(layer.float().weight, before.weight)


def test_int4_to_meta_and_to_empty_and_back() -> None:
    layers: list[Any] = [int4_linear(form) for form in INT4_FORMS]
    layers += [int4_linear(INT4_FORMS[8], activation=None), int4_embedding()]
    for layer in layers:
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        twin = copy.deepcopy(layer)
        layer.to("meta")
        assert all(t.is_meta for t in [*layer.state_dict().values(), *layer.buffers()])
        layer.to_empty(device="cpu").load_state_dict(state)
        assert_same_layer(layer, twin)


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4_meta_construction_answers_with_shapes(form: Int4Form) -> None:
    options = linear_options(form, in_features=4096, out_features=30000, device="meta", dtype=torch.bfloat16)
    layer = Int4Linear(**options)
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    y = layer(torch.empty(2, 7, 4096, device="meta", dtype=torch.bfloat16))
    assert y.is_meta
    assert (y.shape, y.dtype) == ((2, 7, 30000), torch.bfloat16)
    with pytest.raises(ValueError, match="int4_linear: qweight is on meta but the input is on cpu"):
        layer(torch.ones(1, 4096))


def test_int4_embedding_on_meta() -> None:
    table = Int4Embedding(100000, 4096, device="meta", dtype=torch.float16)
    z = table(torch.empty(3, dtype=torch.int64, device="meta"))
    assert z.is_meta
    assert (z.shape, z.dtype) == ((3, 4096), torch.float16)
    with pytest.raises(ValueError, match="int4_embedding: qweight is on meta but the input is on cpu"):
        table(torch.tensor([1]))


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4_copies(form: Int4Form) -> None:
    for layer in (int4_linear(form, "gelu"), int4_embedding()):
        for name, twin in copies(layer).items():
            assert_same_layer(twin, layer)
            for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
                assert a.data_ptr() != b.data_ptr() or a.numel() == 0, f"{name} shares storage"


@pytest.mark.parametrize("case", LINEAR_CASES[:12], ids=str)
def test_int4_linear_of_any_shape(case: LinearCase) -> None:
    for form in INT4_FORMS:
        layer = Int4Linear.from_weights(int4_weights(case.n, case.k, form))
        y = layer(torch.randn(case.m, case.k))
        assert y.shape == (case.m, case.n)
        assert layer.weight.shape == (case.n, case.k)


@pytest.mark.parametrize("k", [70, 72, 69])
def test_an_input_that_fills_the_same_bytes_is_still_wrong(k: int) -> None:
    with pytest.raises(
        ValueError, match=rf"Int4Linear: the input has shape \(2, {k}\); its last .* must be 71"
    ):
        int4_linear(INT4_FORMS[0])(torch.ones(2, k))
    with pytest.raises(ValueError, match=r"int4_linear: x has shape \(\)"):
        int4_linear(INT4_FORMS[0])(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: Int4Linear(3, 4),
            "Int4Linear(in_features=3, out_features=4, bias=True, group_size=128, symmetric=True, "
            "activation='int8')",
        ),
        (
            lambda: Int4Linear(
                3, 4, bias=False, symmetric=False, group_size=32, activation=None, act_fn="gelu"
            ),
            "Int4Linear(in_features=3, out_features=4, bias=False, group_size=32, symmetric=False, "
            "activation=None, act_fn='gelu')",
        ),
        (
            lambda: Int4Linear(3, 4, codebook="channel", group_size=-1, rotated=True),
            "Int4Linear(in_features=3, out_features=4, bias=True, group_size=-1, codebook='channel', "
            "activation='int8', rotated=True)",
        ),
        (
            lambda: Int4Linear(3, 4, group_index=True),
            "Int4Linear(in_features=3, out_features=4, bias=True, group_size=128, symmetric=True, "
            "group_index=True, activation='int8')",
        ),
        (
            lambda: Int4Embedding(5, 6, padding_idx=2),
            "Int4Embedding(5, 6, padding_idx=2, group_size=128, symmetric=True)",
        ),
    ],
)
def test_int4_repr(layer: Any, text: str) -> None:
    assert repr(layer()) == text


def test_training_through_int4() -> None:
    for form in INT4_FORMS:
        below, layer = nn.Linear(20, 71), int4_linear(form, "gelu")
        layer(below(torch.randn(4, 20))).square().sum().backward()
        assert layer.bias is not None
        assert layer.bias.grad is not None
        assert below.weight.grad is not None
        assert float(below.weight.grad.abs().sum()) > 0


def test_int4_under_another_default_device() -> None:
    x, indices = torch.randn(3, 71), torch.tensor([0, 3])
    for form in INT4_FORMS:
        expected = int4_linear(form)
        with torch.device("meta"):
            layer = Int4Linear.from_weights(expected.quantized, expected.bias)
            fresh = Int4Linear(**linear_options(form, device="cpu"))
            fresh.load_state_dict(layer.state_dict())
            outputs = [m(x) for m in (layer, fresh, copy.deepcopy(layer).to("cpu"))]
        for y in outputs:
            assert_same_bits(y, expected(x))
    table = int4_embedding()
    with torch.device("meta"):
        rows = table(indices)
    assert_same_bits(rows, table(indices))
