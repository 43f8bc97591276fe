"""The ops under torch's own checks: opcheck, ``torch.compile(fullgraph=True)``, ``torch.export``."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from lissom.formats import pack_block_sparse
from lissom.nn import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear
from lissom.ops import distill_loss
from lissom.ops.distill_loss import REDUCTIONS
from lissom.ops.int8_linear import int8_pack
from lissom.reference.distill_loss import DIVERGENCES
from lissom.testing import (
    BLOCK_SPARSE_DTYPES,
    DTYPES,
    INT4_FORMS,
    MODES,
    BlockSparseCase,
    DistillCase,
    Int4Form,
    LinearCase,
    assert_same_bits,
    block_sparse_inputs,
    distill_inputs,
    int4_inputs,
    int4_weights,
    linear_inputs,
)

LINEAR = torch.ops.lissom.int8_linear.default
EMBEDDING = torch.ops.lissom.int8_embedding.default
LINEAR4 = torch.ops.lissom.int4_linear.default
EMBEDDING4 = torch.ops.lissom.int4_embedding.default
SPARSE = torch.ops.lissom.block_sparse_linear.default
SPARSE_GRAD_INPUT = torch.ops.lissom.block_sparse_grad_input.default
SPARSE_GRAD_VALUES = torch.ops.lissom.block_sparse_grad_values.default
DISTILL = torch.ops.lissom.distill_loss.default
DISTILL_GRAD = torch.ops.lissom.distill_loss_grad.default


@pytest.mark.parametrize("act_fn", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_linear(implementation: str, mode: str, act_fn: str | None) -> None:
    inputs = linear_inputs(LinearCase(5, 21, 18, ""), torch.float32, mode, act_fn, kind="normal")
    assert inputs.bias is not None
    x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
    result = torch.library.opcheck(LINEAR, (x, *inputs.args[1:3], bias, *inputs.args[4:]))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((0, 21), torch.float32),
        ((21,), torch.float32),
        ((2, 3, 21), torch.bfloat16),
        ((2, 0, 21), torch.float16),
    ],
    ids=str,
)
def test_opcheck_linear_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = linear_inputs(LinearCase(1, 21, 18, ""), dtype, bias=False)
    x = torch.randn(shape).to(dtype)
    packed = int8_pack(inputs.qweight)
    result = torch.library.opcheck(LINEAR, (x, *inputs.args[1:], packed))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_opcheck_embedding(
    implementation: str, shape: tuple[int, ...], dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    indices = torch.zeros(shape, dtype=index_dtype)
    qweight = torch.randint(-127, 128, (5, 7), dtype=torch.int8)
    result = torch.library.opcheck(EMBEDDING, (indices, qweight, torch.rand(5), dtype))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("form", "mode", "cached"),
    [
        (INT4_FORMS[1], "int8", True),
        (INT4_FORMS[2], "rotated", False),
        (INT4_FORMS[8], "weight_only", True),
        (INT4_FORMS[10], "rotated", True),
        (INT4_FORMS[13], "int8", True),
        (INT4_FORMS[14], "weight_only", False),
    ],
    ids=str,
)
def test_opcheck_int4_linear(implementation: str, form: Int4Form, mode: str, cached: bool) -> None:
    act_fn = "silu" if cached else None
    inputs = int4_inputs(LinearCase(6, 71, 18, ""), form, torch.float32, mode, act_fn, kind="normal")
    assert inputs.bias is not None
    x, bias = inputs.x.view(2, 3, 71).clone().requires_grad_(), inputs.bias.clone().requires_grad_()
    result = torch.library.opcheck(LINEAR4, inputs.args(x, cached=cached, bias=bias))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("form", [INT4_FORMS[i] for i in (0, 4, 10)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_opcheck_int4_embedding(implementation: str, shape: tuple[int, ...], form: Int4Form) -> None:
    table = int4_weights(5, 71, form)
    indices = torch.zeros(shape, dtype=torch.int64)
    arguments = (indices, table.qweight, table.weight_scale, table.zero_point, 71, form.group_size)
    for dtype in DTYPES:
        result = torch.library.opcheck(EMBEDDING4, (*arguments, dtype))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("act_fn", [None, "gelu"])
@pytest.mark.parametrize("block_shape", [(8, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_opcheck_block_sparse_linear(
    implementation: str, value_dtype: torch.dtype, block_shape: tuple[int, int], act_fn: str | None
) -> None:
    inputs = block_sparse_inputs(
        BlockSparseCase(6, 29, 18, 0.6, ""), block_shape, value_dtype, torch.float32, act_fn, kind="normal"
    )
    assert inputs.bias is not None
    changes = {"x": inputs.x.view(2, 3, 29).clone(), "bias": inputs.bias.clone()}
    if value_dtype == torch.int8:
        changes["packed"] = pack_block_sparse(inputs.weights)
    else:
        changes["values"] = inputs.weights.values.clone()
    for name in changes.keys() - {"packed"}:
        changes[name].requires_grad_()
    for validated in (False, True):
        result = torch.library.opcheck(SPARSE, inputs.args(**changes, validated=validated))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("leading", [(2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_opcheck_block_sparse_gradients(
    implementation: str, value_dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    w = block_sparse_inputs(BlockSparseCase(1, 29, 18, 0.6, ""), (8, 4), value_dtype).weights
    grad = torch.randn(*leading, 18, requires_grad=True)
    values = w.values.clone().requires_grad_(value_dtype != torch.int8)
    args = (grad, values, w.crow_indices, w.col_indices, 18, 29, w.weight_scale)
    assert set(torch.library.opcheck(SPARSE_GRAD_INPUT, args).values()) == {"SUCCESS"}
    x = torch.randn(*leading, 29, requires_grad=True)
    args = (grad, x, w.crow_indices, w.col_indices, 8, 4)
    assert set(torch.library.opcheck(SPARSE_GRAD_VALUES, args).values()) == {"SUCCESS"}


def distill_options(divergence: str = "forward", reduction: str = "batchmean") -> tuple[Any, ...]:
    """The options of ``lissom::distill_loss``, from ``temperature`` to ``reduction``."""
    return (2.0, 1.0, 0.5, 0.1, divergence, 0.3, -100, 0.1, 20.0, 1.0, 1.5, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck_distill_loss(implementation: str, divergence: str, reduction: str) -> None:
    dtype = DTYPES[(DIVERGENCES.index(divergence) + REDUCTIONS.index(reduction)) % 3]
    inputs = distill_inputs(DistillCase(6, 29, ""), dtype)
    given = (inputs.student.clone().requires_grad_(), inputs.teacher, inputs.labels)
    options = distill_options(divergence, reduction)
    for with_grad in (True, False):
        result = torch.library.opcheck(DISTILL, (*given, *options, with_grad, None))
        assert set(result.values()) == {"SUCCESS"}
    grad_loss = torch.rand(6) if reduction == "none" else torch.tensor(0.5)
    result = torch.library.opcheck(DISTILL_GRAD, (grad_loss, inputs.student, *given[1:], *options, None))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("leading", [(2, 3), (0,), ()], ids=str)
def test_opcheck_distill_loss_shapes(implementation: str, leading: tuple[int, ...]) -> None:
    student = torch.randn(*leading, 29, requires_grad=True)
    only_ce = (1.0, 0.0, 1.0, *distill_options(reduction="none")[3:])
    labels = torch.zeros(leading, dtype=torch.int32)
    result = torch.library.opcheck(DISTILL, (student, None, labels, *only_ce, True, None))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distill_loss_fakes_tell_the_shape_dtype_and_strides(dtype: torch.dtype) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = distill_inputs(DistillCase(6, 29, ""), dtype, ignored=False)
    student, teacher = inputs.student.view(2, 3, 29), inputs.teacher.view(2, 3, 29)
    for reduction in REDUCTIONS:
        for view in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:1].expand(4, -1, -1)):
            args = (None, *distill_options(reduction=reduction))
            args = (*args[:3], 0.0, *args[4:])
            grad_loss = torch.ones(view(student).shape[:-1] if reduction == "none" else ())
            with FakeTensorMode() as mode:
                fake_tensors = [mode.from_tensor(x) for x in (student, teacher, grad_loss)]
                fakes = [
                    *DISTILL(*map(view, fake_tensors[:2]), *args, True, None),
                    *DISTILL(*map(view, fake_tensors[:2]), *args, False, None),
                    DISTILL_GRAD(fake_tensors[2], *map(view, fake_tensors[:2]), *args, None),
                ]
            reals = [
                *DISTILL(view(student), view(teacher), *args, True, "reference"),
                *DISTILL(view(student), view(teacher), *args, False, "reference"),
                DISTILL_GRAD(grad_loss, view(student), view(teacher), *args, "reference"),
            ]
            for fake, real in zip(fakes, reals, strict=True):
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_block_sparse_fakes_tell_the_shape_dtype_and_strides(
    value_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = block_sparse_inputs(BlockSparseCase(6, 29, 18, 0.6, ""), (8, 4), value_dtype, dtype)
    w = inputs.weights
    grad = torch.randn(6, 18).to(dtype)
    calls = (
        (SPARSE, inputs.args()),
        (SPARSE_GRAD_INPUT, (grad, *inputs.args()[1:7])),
        (SPARSE_GRAD_VALUES, (grad, inputs.x, w.crow_indices, w.col_indices, 8, 4)),
    )
    for view in (lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x[:, None].expand(-1, 4, -1)):
        for op, given in calls:
            rows = 2 if op is SPARSE_GRAD_VALUES else 1
            real = op(*map(view, given[:rows]), *given[rows:])
            with FakeTensorMode() as mode:
                args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
                fake = op(*map(view, args[:rows]), *args[rows:])
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("form", INT4_FORMS, ids=str)
def test_int4_fake_tells_the_shape_dtype_and_strides(form: Int4Form) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in DTYPES:
        inputs = int4_inputs(LinearCase(6, 71, 18, ""), form, dtype)
        for view in (
            lambda x: x,
            lambda x: x.t().contiguous().t(),
            lambda x: x.view(2, 3, 71).transpose(0, 1),
        ):
            real = LINEAR4(*inputs.args(view(inputs.x), cached=True))
            given = inputs.args(cached=True)
            with FakeTensorMode() as mode:
                args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
                fake = LINEAR4(view(args[0]), *args[1:])
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_fake_tells_the_shape_dtype_and_strides(mode: str, dtype: torch.dtype) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = linear_inputs(LinearCase(6, 21, 18, ""), dtype, mode)
    for view in (lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x.view(2, 3, 21).transpose(0, 1)):
        real = LINEAR(view(inputs.x), *inputs.args[1:])
        with FakeTensorMode() as mode_:
            args = [mode_.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in inputs.args]
            fake = LINEAR(view(args[0]), *args[1:])
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_fake_makes_the_same_checks() -> None:
    """A wrong shape is found while tracing, not at the first real call."""
    x = torch.empty(2, 5, device="meta")
    q, s = torch.empty(3, 4, dtype=torch.int8, device="meta"), torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\) but qweight is \[N=3, K=4\]"):
        LINEAR(x, q, s)
    with pytest.raises(TypeError, match=r"indices have dtype torch\.float32"):
        EMBEDDING(x, q, s, torch.float32)
    q4 = torch.empty(3, 2, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\) but qweight is \(3, 2\)"):
        LINEAR4(x, q4, s)
    with pytest.raises(ValueError, match=r"weight_scale must be float16, bfloat16 or float32 \[3, 1\]"):
        EMBEDDING4(x.long(), q4, s, None, 4, 32, torch.float32)
    values, crow, col = (
        torch.empty(size, dtype=dtype, device="meta")
        for size, dtype in (((1, 8, 1), torch.float32), (2, torch.int32), (1, torch.int32))
    )
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\) but the weight has K=4"):
        SPARSE(x, values, crow, col, 3, 4)
    with pytest.raises(ValueError, match=r"grad has shape \(2, 5\) but the weight has N=3"):
        SPARSE_GRAD_INPUT(x, values, crow, col, 3, 4)
    with pytest.raises(ValueError, match=r"vocabulary of 5 but teacher_logits of 4"):
        DISTILL(x, x[:, :4], None, 2.0, 1.0, 0.0, *distill_options()[3:], True, None)
    with pytest.raises(ValueError, match=r"crow_indices must be int32 \[6\] for N=5 in blocks of 1 outputs"):
        SPARSE_GRAD_VALUES(x, x, crow, col, 1, 8)


class Model(nn.Module):
    """Embedding, two linears of different modes, and a residual: what a compiler would break the graph on."""

    def __init__(self, kind: str = "int8") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table: nn.Module
        self.up: nn.Module
        self.down: nn.Module
        if kind == "int8":
            self.table = Int8Embedding.from_embedding(nn.Embedding(30, 24))
            self.up = Int8Linear.from_linear(nn.Linear(24, 50), act_fn="gelu")
            self.down = Int8Linear.from_linear(nn.Linear(50, 24))
            return
        self.table = Int4Embedding(30, 24, symmetric=False)
        table = int4_weights(30, 24, Int4Form(128, torch.uint8))
        assert table.zero_point is not None
        state = {"qweight": table.qweight, "weight_scale": table.weight_scale, "zero_point": table.zero_point}
        self.table.load_state_dict(state)
        bias = torch.linspace(-1, 1, 50)
        self.up = Int4Linear.from_weights(int4_weights(50, 24, INT4_FORMS[2]), bias, act_fn="gelu")
        self.down = Int4Linear.from_weights(int4_weights(24, 50, INT4_FORMS[15]))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        h = self.table(indices)
        return h + self.down(self.up(h)) * 2


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile_fullgraph(compiler: str, kind: str) -> None:
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch's inductor needs a C++ compiler")
    model = Model(kind).eval()
    run = compiled(model, backend=compiler)
    for count in (7, 7, 12):  # the last one is a new shape
        indices = torch.randint(0, 30, (2, count))
        with torch.no_grad():
            # The float residual may be fused by the compiler, but is the same three roundings.
            torch.testing.assert_close(run(indices), model(indices), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compile_backward(mode: str) -> None:
    inputs = linear_inputs(LinearCase(6, 21, 18, ""), torch.float32, mode, "silu", kind="normal")

    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return LINEAR(x, *inputs.args[1:3], bias, *inputs.args[4:]).square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        assert inputs.bias is not None
        x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
        function(x, bias).backward()
        grads.append((x.grad, bias.grad))
    for eager, traced in zip(*grads, strict=True):
        assert eager is not None
        assert traced is not None
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", [INT4_FORMS[i] for i in (1, 8, 13)], ids=str)
def test_compile_int4_backward(form: Int4Form) -> None:
    inputs = int4_inputs(LinearCase(6, 71, 18, ""), form, torch.float32, "int8", "silu", kind="normal")

    def loss(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return LINEAR4(*inputs.args(x, bias=bias)).square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        assert inputs.bias is not None
        x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
        function(x, bias).backward()
        grads.append((x.grad, bias.grad))
    for eager, traced in zip(*grads, strict=True):
        assert eager is not None
        assert traced is not None
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("value_dtype", BLOCK_SPARSE_DTYPES, ids=str)
def test_compile_block_sparse_backward(value_dtype: torch.dtype, compiler: str) -> None:
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch's inductor needs a C++ compiler")
    inputs = block_sparse_inputs(
        BlockSparseCase(6, 29, 18, 0.6, ""), (3, 5), value_dtype, torch.float32, "silu", kind="normal"
    )

    def loss(x: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return SPARSE(*inputs.args(x, bias=bias, values=values)).square().sum()

    torch._dynamo.reset()
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        for m in (6, 6, 4):  # the last one is a new shape
            assert inputs.bias is not None
            leaves = [inputs.x[:m].clone(), inputs.bias.clone(), inputs.weights.values.clone()]
            for leaf in leaves:
                leaf.requires_grad_(leaf.is_floating_point())
            value = function(*leaves)
            value.backward()
            grads.append([value.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for eager, traced in zip(grads[:3], grads[3:], strict=True):
        for e, t in zip(eager, traced, strict=True):
            assert e is not None
            assert t is not None
            torch.testing.assert_close(t, e, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compile_distill_loss(dtype: torch.dtype, compiler: str) -> None:
    """Forward and backward in one graph; gradients scaled and not, per row and not."""
    if compiler == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch's inductor needs a C++ compiler")

    def loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        first = distill_loss(student, teacher, labels, ce_weight=1.0, temperature=2.0)
        rows = distill_loss(student, teacher, divergence="js", reduction="none")
        return first * 0.5 + (rows * rows).sum() + distill_loss(student, teacher, reduction="sum")

    torch._dynamo.reset()
    values = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        for m in (6, 6, 4):  # the last one is a new shape
            inputs = distill_inputs(DistillCase(m, 29, ""), dtype)
            student = inputs.student.clone().requires_grad_()
            value = function(student, inputs.teacher, inputs.labels)
            value.backward()
            values.append((value.detach(), student.grad))
    rtol = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for eager, traced in zip(values[:3], values[3:], strict=True):
        for e, t in zip(eager, traced, strict=True):
            assert e is not None
            assert t is not None
            torch.testing.assert_close(t, e, rtol=rtol, atol=rtol * float(e.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_export_keeps_the_ops_and_gives_the_same(kind: str) -> None:
    model = Model(kind).eval()
    indices = torch.randint(0, 30, (2, 7))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (indices,), dynamic_shapes=({0: batch},))
    called = [str(node.target) for node in program.graph.nodes if "lissom" in str(node.target)]
    assert called == [
        f"lissom.{kind}_embedding.default",
        f"lissom.{kind}_linear.default",
        f"lissom.{kind}_linear.default",
    ]
    other = torch.randint(0, 30, (5, 7))
    for example in (indices, other):
        assert_same_bits(program.module()(example), model(example))


def test_make_fx_and_functionalization() -> None:
    """The ops declare no aliasing and no mutation."""
    for op in (
        *(LINEAR, EMBEDDING, LINEAR4, EMBEDDING4),
        *(SPARSE, SPARSE_GRAD_INPUT, SPARSE_GRAD_VALUES, DISTILL, DISTILL_GRAD),
    ):
        schema = op._schema
        assert not schema.is_mutable
        assert all(argument.alias_info is None for argument in [*schema.arguments, *schema.returns])
