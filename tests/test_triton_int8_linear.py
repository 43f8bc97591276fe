"""The Triton kernels of ``int8_linear``, on a GPU or in Triton's interpreter: the reference's bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from dense_checks import check_dense
from torch import Tensor

from lissom import _triton, formats, registry
from lissom.config import Int8
from lissom.nn import Int8Linear
from lissom.ops import int8_linear
from lissom.reference import int8_linear as page
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    ACT_FNS,
    DTYPES,
    EXACT_ACT_FNS,
    GRAD_TOLERANCE,
    LINEAR_CASES,
    MODES,
    ROW_KINDS,
    UNIT_ROUNDOFF,
    VIEWS,
    LinearCase,
    LinearInputs,
    assert_same_bits,
    assert_within,
    float_tolerance,
    linear_inputs,
    weight_only_bound,
)

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities that are meant
]

OP = torch.ops.lissom.int8_linear.default


def kernels() -> ModuleType:
    return _triton.load("int8_linear")


def on(device: str, inputs: LinearInputs) -> LinearInputs:
    moved = {
        field.name: value.to(device) if isinstance(value := getattr(inputs, field.name), Tensor) else value
        for field in dataclasses.fields(inputs)
    }
    return LinearInputs(**moved)


def run(inputs: LinearInputs, rotated: bool = False, backend: str = "triton") -> Tensor:
    y: Tensor = OP(*inputs.args, None, backend, rotated)
    return y


def check(y: Tensor, inputs: LinearInputs, rotated: bool = False) -> None:
    """Bits where quantized, otherwise the bound that holds for float32 sums in any order."""
    if not inputs.weight_only:
        assert_same_bits(y, run(inputs, rotated, "reference"))
        return
    if len(y) >= kernels().LEAST_DENSE_ROWS and y.dtype != torch.float32:
        weight = formats.dequantize_int8(inputs.qweight, inputs.weight_scale)
        check_dense(y, inputs.x, weight, inputs.bias, inputs.act_fn)
        return
    assert y.dtype == inputs.x.dtype
    z = (inputs.x.double() @ inputs.qweight.double().t()) * inputs.weight_scale.double()
    z = z if inputs.bias is None else z + inputs.bias.double()
    bound = weight_only_bound(inputs.x, inputs.qweight, inputs.weight_scale, inputs.bias)
    exact = EXACT_ACT_FNS[inputs.act_fn](z)
    bound = bound * ACT_FN_LIPSCHITZ + (ACT_FN_ERROR * z.abs() + 1e-37 if inputs.act_fn else 0.0)
    bound = bound + float_tolerance(exact.abs() + bound, y.dtype)
    inside = exact.abs() + bound < torch.finfo(y.dtype).max
    inside &= inputs.x.double().abs() @ inputs.qweight.double().abs().t() < torch.finfo(torch.float32).max
    assert_within(y[inside], exact[inside], bound[inside])


def forced(inputs: LinearInputs, plan: Any, rotated: bool = False) -> Tensor:
    """The result of a plan of the caller's choice."""
    y: Tensor = kernels().int8_linear(
        inputs.x,
        inputs.qweight,
        inputs.weight_scale,
        inputs.bias,
        inputs.input_scale,
        inputs.weight_only,
        inputs.act_fn,
        rotated,
        plan,
    )
    return y


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_every_shape(triton_device: str, case: LinearCase, mode: str, dtype: torch.dtype) -> None:
    if triton_device == "cpu" and case.m > 1000:
        pytest.skip("too large for Triton's interpreter")
    act_fn = ACT_FNS[(sum(case[:3]) + len(mode) + DTYPES.index(dtype)) % len(ACT_FNS)]
    inputs = on(triton_device, linear_inputs(case, dtype, mode, act_fn))
    y = run(inputs)
    assert y.shape == (case.m, case.n)
    check(y, inputs)


@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [*MODES, "rotated"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_every_option(
    triton_device: str, mode: str, dtype: torch.dtype, act_fn: str | None, bias: bool
) -> None:
    case = LinearCase(19, 45, 37, "options")
    inputs = on(triton_device, linear_inputs(case, dtype, mode, act_fn, bias=bias, seed=3))
    check(run(inputs, mode == "rotated"), inputs, mode == "rotated")


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [*MODES, "rotated"])
def test_every_kind_of_row(triton_device: str, mode: str, dtype: torch.dtype, kind: str, m: int) -> None:
    inputs = on(
        triton_device, linear_inputs(LinearCase(m, 70, 20, "row kinds"), dtype, mode, None, kind=kind)
    )
    check(run(inputs, mode == "rotated"), inputs, mode == "rotated")


@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 33, 64, 200, 4100, 9000])
@pytest.mark.parametrize("m", [1, 3, 5])
def test_rotation(triton_device: str, m: int, k: int) -> None:
    """Whole blocks of 16, a shorter last one, rows that are read in one piece and in several."""
    inputs = on(triton_device, linear_inputs(LinearCase(m, k, 24, "rotation"), kind="normal"))
    check(run(inputs, True), inputs, True)


def test_rows_of_several_sizes_are_quantized_as_the_reference_does(triton_device: str) -> None:
    """Scales and int8 values themselves, and zeros in the columns that pad them."""
    for m, k in ((1, 5), (40, 16), (17, 100), (3, 8192), (2, 8200)):
        x = on(triton_device, linear_inputs(LinearCase(m, k, 1, "rows"), torch.bfloat16)).x
        scale = torch.tensor(0.02, device=triton_device)
        for input_scale in (None, scale):
            call = kernels()._Call(x, x, scale, None, input_scale, None, False, x.new_empty(m, 1))
            q, scales = kernels()._quantize(call, None)
            expected_q, expected_scales = page.quantize_rows(x, input_scale)
            assert_same_bits(q[:, :k], expected_q)
            assert_same_bits(scales, expected_scales.contiguous())
            assert not q[:, k:].any()


def test_extreme_sums(triton_device: str) -> None:
    """All |q| = 127 with every combination of signs; float(acc) where acc is no float32; the largest K."""
    k = 4099
    signs = torch.tensor([[1.0], [-1.0]]).repeat(2, k)
    signs[2:, ::2] *= -1
    qweight = (signs * 127).to(triton_device, torch.int8)
    ones = torch.ones(4, device=triton_device)
    x = (signs * 3).to(triton_device)
    assert_same_bits(OP(x, qweight, ones, backend="triton"), OP(x, qweight, ones, backend="reference"))

    k = 2000
    qweight = torch.full((40, k), 127, dtype=torch.int8)
    for n in range(40):
        qweight[n, : n + 1] = 126 - n
    x = torch.full((6, k), 127.0)
    x[:, 1::3] = 126.0
    x, qweight, ones = x.to(triton_device), qweight.to(triton_device), torch.ones(40, device=triton_device)
    assert_same_bits(OP(x, qweight, ones, backend="triton"), OP(x, qweight, ones, backend="reference"))

    k = formats.INT8_MAX_IN_FEATURES
    x = torch.ones(1, k, device=triton_device)
    qweight = torch.full((3, k), 127, dtype=torch.int8, device=triton_device)
    qweight[1] = -127
    y = OP(x, qweight, torch.ones(3, device=triton_device), backend="triton")
    assert_same_bits(y, OP(x, qweight, torch.ones(3, device=triton_device), backend="reference"))
    assert y[0, 0].item() == -y[0, 1].item() == pytest.approx(127 * k, rel=1e-6)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("act_fn", ACT_FNS)
def test_negative_zero(triton_device: str, mode: str, act_fn: str | None) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [-0.0, -0.0, -0.0], [1.0, -1.0, 0.0]], device=triton_device)
    qweight = torch.tensor([[5, 5, 5], [-5, -5, 3]], dtype=torch.int8, device=triton_device)
    scale = torch.tensor(0.5, device=triton_device) if mode == "static" else None
    w = torch.tensor([0.5, 0.25], device=triton_device)
    for bias in (None, torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0])):
        args = (x, qweight, w, None if bias is None else bias.to(triton_device), scale, False, act_fn)
        assert_same_bits(OP(*args, None, "triton"), OP(*args, None, "reference"))


@pytest.mark.parametrize("m", [1, 18])
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 3e-39, 0.25, 7.3e5, 1e30])
def test_static_scales_of_any_magnitude_and_shape(triton_device: str, scale: float, m: int) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(m, 37, 19, "static scales"), torch.float32, "static"))
    for shape in ((), (1,), (1, 1)):
        given = torch.full(shape, scale, device=triton_device)
        check(run(given_scale := dataclasses.replace(inputs, input_scale=given)), given_scale)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_any_float_dtype(triton_device: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(4, 33, 21, "bias dtype"), dtype))
    assert inputs.bias is not None
    inputs = dataclasses.replace(inputs, bias=inputs.bias.to(bias_dtype))
    check(run(inputs), inputs)


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("position", [0, 16, 36])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["dynamic", "static", "rotated"])
@pytest.mark.parametrize("m", [2, 14])
def test_a_row_with_nan_or_infinity_is_nan(
    triton_device: str, m: int, mode: str, bad: float, position: int
) -> None:
    for dtype in DTYPES:
        case = LinearCase(m, 37, 18, "bad rows")
        inputs = on(triton_device, linear_inputs(case, dtype, mode, "relu", kind="normal"))
        clean = run(inputs, mode == "rotated")
        inputs.x[1, position] = bad
        y = run(inputs, mode == "rotated")
        assert bool(y[1].isnan().all())
        good = [i for i in range(m) if i != 1]
        assert_same_bits(y[good], clean[good])
        check(y, inputs, mode == "rotated")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 14])
def test_weight_only_carries_nan_and_infinity(
    triton_device: str, m: int, dtype: torch.dtype, bad: float
) -> None:
    case = LinearCase(m, 37, 18, "bad rows")
    inputs = on(triton_device, linear_inputs(case, dtype, "weight_only", None, kind="normal"))
    clean = run(inputs)
    inputs.x[0, 36] = bad
    y = run(inputs)
    assert not bool(y[0].isfinite().any())
    assert_same_bits(y[1:], clean[1:])


def test_nan_scale_and_bias_reach_the_output(triton_device: str) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(3, 8, 4, "bad scale")))
    scale, bias = inputs.weight_scale.clone(), torch.zeros(4, device=triton_device)
    scale[1], bias[2] = math.nan, math.nan
    y = OP(torch.ones_like(inputs.x), inputs.qweight, scale, bias, backend="triton")
    assert y.isnan().any(dim=0).tolist() == [False, True, True, False]


def test_overflow_of_float16_output_is_infinite(triton_device: str) -> None:
    x = torch.full((1, 64), 60000.0, dtype=torch.float16, device=triton_device)
    qweight = torch.full((2, 64), 127, dtype=torch.int8, device=triton_device)
    y = OP(x, qweight, torch.tensor([1.0, -1.0], device=triton_device), backend="triton")
    assert y.tolist() == [[math.inf, -math.inf]]


# ------------------------------------------------------------------------------------------- shapes, strides


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(37,), (1, 37), (2, 3, 37), (2, 1, 4, 37), (0, 37), (3, 0, 37), (0, 2, 37)]
)
def test_leading_dimensions(triton_device: str, shape: tuple[int, ...], mode: str) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(40, 37, 18, "leading"), torch.float32, mode))
    count = math.prod(shape[:-1])
    flat = dataclasses.replace(inputs, x=inputs.x[:count])
    y = run(dataclasses.replace(inputs, x=inputs.x[:count].reshape(shape)))
    assert y.shape == (*shape[:-1], 18)
    assert y.is_contiguous()
    assert_same_bits(y.reshape(count, 18), run(flat))


@pytest.mark.parametrize("shape", [(0,), (4, 0), (2, 3, 0), (0, 0), (0, 3, 0)])
@pytest.mark.parametrize("weight_only", [False, True])
def test_no_terms(triton_device: str, shape: tuple[int, ...], weight_only: bool) -> None:
    bias = torch.tensor([-1.0, 2.0, -0.5], device=triton_device)
    qweight = torch.empty(3, 0, dtype=torch.int8, device=triton_device)
    x, scale = torch.empty(shape, device=triton_device), torch.zeros(3, device=triton_device)
    y = OP(x, qweight, scale, bias, None, weight_only, "relu", None, "triton")
    assert_same_bits(y, bias.relu().expand(*shape[:-1], 3).contiguous())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", MODES)
def test_any_strides(triton_device: str, mode: str, view: str) -> None:
    for dtype in DTYPES:
        inputs = on(triton_device, linear_inputs(LinearCase(20, 37, 18, "strides"), dtype, mode))
        x = VIEWS[view](inputs.x)
        before = x.clone()
        y = run(dataclasses.replace(inputs, x=x))
        assert_same_bits(y, run(dataclasses.replace(inputs, x=x.contiguous())))
        assert_same_bits(x, before)


@pytest.mark.parametrize("mode", MODES)
def test_expanded_input(triton_device: str, mode: str) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(20, 37, 18, "strides"), torch.float32, mode))
    for x in (inputs.x[:1].expand(13, 37), inputs.x[:, :1].expand(20, 37), inputs.x[0].expand(3, 2, 37)):
        y = run(dataclasses.replace(inputs, x=x))
        assert_same_bits(y, run(dataclasses.replace(inputs, x=x.contiguous())))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [1, 6])
def test_other_arguments_of_any_strides(triton_device: str, m: int, mode: str) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(m, 64, 18, "strides"), torch.float32, mode))
    assert inputs.bias is not None
    y = run(inputs)
    wide = torch.cat([inputs.qweight, inputs.qweight[:, :32]], dim=1)
    odd = torch.cat([inputs.qweight[0, :1], inputs.qweight.flatten()])[1:].view(18, 64)
    for qweight in (inputs.qweight.t().contiguous().t(), wide[:, :64], odd):
        changed = dataclasses.replace(
            inputs,
            qweight=qweight,
            weight_scale=torch.stack([inputs.weight_scale, inputs.weight_scale * 0], 1)[:, 0],
            bias=torch.stack([inputs.bias, inputs.bias * 0], 1)[:, 0],
        )
        if mode == "weight_only":  # another alignment, another plan, another order of sums
            check(run(changed), changed)
        else:
            assert_same_bits(run(changed), y)
    expanded = dataclasses.replace(
        inputs,
        qweight=inputs.qweight[:1].expand(18, 64),
        weight_scale=inputs.weight_scale[:1].expand(18),
        bias=inputs.bias[:1].expand(18),
    )
    check(run(expanded), expanded)


@pytest.mark.parametrize("mode", MODES)
def test_given_packed_weights_are_not_needed(triton_device: str, mode: str) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(3, 40, 18, "packed"), torch.float32, mode))
    packed = torch.zeros(formats.packed_int8_shape(18, 40), dtype=torch.int8, device=triton_device)
    assert_same_bits(OP(*inputs.args, packed, "triton"), run(inputs))


@pytest.mark.parametrize("mode", ["dynamic", "static", "rotated"])
def test_rows_do_not_depend_on_each_other(triton_device: str, mode: str) -> None:
    inputs = on(triton_device, linear_inputs(LinearCase(70, 65, 40, "batch"), torch.float32, mode))
    together = run(inputs, mode == "rotated")
    for m in (1, 2, 3, 4, 5, 16, 17, 64, 65):
        some = dataclasses.replace(inputs, x=inputs.x[-m:])
        assert_same_bits(run(some, mode == "rotated"), together[-m:])


# ------------------------------------------------------------------------------------------- plans


def every_plan() -> list[Any]:
    """Each plan of the tables, and the lists it is in; empty where Triton is absent."""
    if _triton._triton_reason():
        return []
    module = kernels()
    tables = {**module._INT8, "int8 unaligned": module._INT8_UNALIGNED}
    tables |= {f"weight-only {name}": table for name, table in module._WEIGHT_ONLY.items()}
    found: dict[tuple[str, str], tuple[Any, list[str]]] = {}
    for name, table in tables.items():
        kind = "float" if "float" in name else ""
        for plan in (plan for plans in table.values() for plan in plans):
            found.setdefault((kind, str(plan)), (plan, []))[1].append(name)
    return [
        pytest.param(*value, id=f"{value[0]}{kind}".replace(" ", "-")) for (kind, _), value in found.items()
    ]


@pytest.mark.parametrize(("plan", "lists"), every_plan())
def test_every_plan(triton_device: str, plan: Any, lists: list[str]) -> None:
    """Tiles with and without a rest in each dimension, K in one part and in several; few rows."""
    module = kernels()
    weight_only = plan.form.startswith("weight_only")
    if triton_device == "cuda":
        family = module._family(module.architecture(torch.device("cuda")))
        here = {family, "int8 unaligned", "weight-only half", "weight-only unaligned"}
        here.add("weight-only float blackwell" if family == "blackwell" else "weight-only float")
        if not here & set(lists):
            pytest.skip(f"this GPU is {family}, the plan is for {', '.join(lists)}")
    dtype = torch.float32 if "float" in " ".join(lists) else torch.bfloat16
    if "BLOCK_M" not in plan.sizes:
        cases = [(m, 1040 if m % 2 else 1037, 70) for m in (1, 2, 3, 4)]
    elif plan.form == "persistent":
        cases = [(150, 272, 300), (600, 48, 40)]
    else:
        cases = [(5, 9 * plan.sizes["BLOCK_K"] + 16, 20), (150, 48, 70), (70, 101, 33)]
        processors = module._multiprocessors(torch.device(triton_device))
        splits = [module._splits(plan, processors, m, n, k)[0] for m, k, n in cases]
        assert splits[0] > 1 == splits[1] == splits[2]
    for m, k, n in cases:
        inputs = linear_inputs(
            LinearCase(m, k, n, "plans"), dtype, "weight_only" if weight_only else "dynamic"
        )
        inputs = on(triton_device, inputs)
        rotated = not weight_only and m % 2 == 0
        check(forced(inputs, plan, rotated), inputs, rotated)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_split_sums_have_the_same_bits_every_time(triton_device: str, mode: str) -> None:
    """Whichever program comes last. A launch leaves its counters as it found them."""
    module = kernels()
    inputs = on(triton_device, linear_inputs(LinearCase(20, 4096, 40, "split"), torch.float32, mode, "gelu"))
    plan = module._tiles(32, 32, 64, 4, 2, 8, "weight_only" if mode == "weight_only" else "tiles")
    assert module._splits(plan, module._multiprocessors(inputs.x.device), 20, 40, 4096)[0] > 4
    y = forced(inputs, plan)
    check(y, inputs)
    for _ in range(3):
        assert_same_bits(forced(inputs, plan), y)


def test_plans_cover_every_shape() -> None:
    """Every architecture has a plan for any number of rows; tiles grow with the rows, splits cover K."""
    if reason := _triton._triton_reason():
        pytest.skip(f"triton: {reason}")
    module = kernels()
    for architecture in (80, 86, 87, 89, 90, 100, 103, 120):
        for m in (1, 2, 3, 4, 5, 16, 17, 64, 65, 256, 257, 1024, 100000):
            for n, k in ((1, 1), (4096, 4096), (28672, 8192), (128256, 4096), (17, 100000)):
                for dtype, weight_only, aligned in (
                    (torch.bfloat16, False, True),
                    (torch.bfloat16, False, False),
                    (torch.float32, True, True),
                    (torch.float16, True, True),
                    (torch.float16, True, False),
                ):
                    plans = module.candidates(architecture, 132, m, n, k, dtype, weight_only, aligned)
                    assert len({str(plan) for plan in plans}) == len(plans) > 0
                    for plan in plans:
                        assert aligned or plan.form != "persistent"
                        assert (plan.form.startswith("weight_only")) == weight_only
                        if "BLOCK_M" in plan.sizes:
                            splits, steps = module._splits(plan, 132, m, n, k)
                            blocks = -(-k // plan.sizes["BLOCK_K"])
                            assert (splits - 1) * steps < blocks <= splits * steps
                        else:
                            assert m <= 4 or plan == module.DENSE
    large = module.candidates(90, 132, 4096, 4096, 4096, torch.bfloat16, False, True)[0]
    assert (large.form, large.sizes["BLOCK_N"]) == ("persistent", 256)
    few = module.candidates(90, 132, 1, 4096, 4096, torch.bfloat16, False, True)[0]
    assert few.form == "fused"


def test_autotuning_keeps_the_bits_and_a_winner(
    triton_device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    tiles = __import__("lissom.kernels.tiles", fromlist=["tiles"])
    for mode in ("dynamic", "weight_only"):
        inputs = on(triton_device, linear_inputs(LinearCase(9, 64, 40, "tuned"), torch.bfloat16, mode))
        with tiles.autotune():
            check(run(inputs), inputs)
        check(run(inputs), inputs)
    assert "lissom: tuned int8_linear 16 40 64" in capsys.readouterr().err
    assert "int8_linear 16 40 64" in next(tmp_path.iterdir()).read_text()


# ------------------------------------------------------------------------------------------- the op


def test_which_backend_runs(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISSOM_BACKEND", raising=False)
    named = registry.select("int8_linear", triton_device, "triton")
    assert named.name == "triton"
    assert "triton" in named.detail()
    if triton_device == "cuda":
        assert registry.select("int8_linear", "cuda").name == "triton"
    ran: list[str] = []
    launch = kernels().int8_linear
    monkeypatch.setattr(kernels(), "int8_linear", lambda *args: (ran.append("triton"), launch(*args))[1])
    x, q = torch.ones(2, 4, device=triton_device), torch.ones(3, 4, dtype=torch.int8, device=triton_device)
    int8_linear(x, q, torch.ones(3, device=triton_device), backend="triton")
    assert ran == ["triton"]


@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("mode", [*MODES, "rotated"])
def test_gradients(triton_device: str, mode: str, act_fn: str | None) -> None:
    """As the reference's: backward is built on the op, which runs on the same backend."""
    for dtype in DTYPES:
        case = LinearCase(7, 32, 18, "gradients")
        inputs = on(triton_device, linear_inputs(case, dtype, mode, act_fn, kind="normal"))
        assert inputs.bias is not None
        grads = []
        for backend in ("triton", "reference"):
            x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
            y = run(dataclasses.replace(inputs, x=x, bias=bias), mode == "rotated", backend)
            grad = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(dtype)
            grads.append(torch.autograd.grad(y, (x, bias), grad))
        for ours, theirs in zip(*grads, strict=True):
            assert ours.dtype == dtype
            bound = (GRAD_TOLERANCE[dtype] * theirs.double().abs().max()).expand(theirs.shape)
            assert_within(ours, theirs.double(), bound)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(triton_device: str, mode: str) -> None:
    case = LinearCase(5, 32, 18, "opcheck")
    inputs = on(triton_device, linear_inputs(case, torch.float32, mode, "gelu", kind="normal"))
    torch.library.opcheck(OP, (*inputs.args, None, "triton"))
    assert inputs.bias is not None
    x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
    trained = dataclasses.replace(inputs, x=x, bias=bias)
    torch.library.opcheck(OP, (*trained.args, None, "triton"))


def test_bad_input_is_named_before_any_launch(triton_device: str) -> None:
    x, q = torch.ones(2, 5, device=triton_device), torch.ones(3, 4, dtype=torch.int8, device=triton_device)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\) but qweight is \[N=3, K=4\]"):
        int8_linear(x, q, torch.ones(3, device=triton_device), backend="triton")


def test_mixed_devices_are_named(triton_device: str) -> None:
    other = "meta" if triton_device == "cpu" else "cpu"
    x, q = torch.ones(2, 4, device=triton_device), torch.ones(3, 4, dtype=torch.int8, device=other)
    with pytest.raises(ValueError, match=rf"qweight is on {other} but the input is on {triton_device}"):
        int8_linear(x, q, torch.ones(3, device=triton_device), backend="triton")


# ------------------------------------------------------------------------------------------- the layer


def test_layer_without_a_packed_copy(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer on a GPU is: canonical tensors only."""
    monkeypatch.setenv("LISSOM_BACKEND", "triton")
    torch.manual_seed(0)
    for mode in ("dynamic", None):
        config = Int8(activation=mode, rotation=mode is not None)
        layer = Int8Linear.from_linear(torch.nn.Linear(48, 20), config).to(triton_device)
        layer._packed = None
        x = torch.randn(3, 48, device=triton_device)
        with torch.no_grad():
            y = layer(x)
        args = (layer.qweight, layer.weight_scale, layer.bias, None, mode is None, None, None)
        assert_same_bits(y, OP(x, *args, "triton", layer.rotated))


def test_a_layer_that_cannot_move_stays_as_it_was() -> None:
    layer = Int8Linear.from_linear(torch.nn.Linear(48, 20))
    packed, x = layer._packed, torch.randn(3, 48)
    expected = layer(x)

    def full(tensor: Tensor) -> Tensor:
        if tensor.numel():
            raise torch.OutOfMemoryError("no room")
        return tensor.to("meta")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        layer._apply(full)
    assert layer._packed is packed
    assert_same_bits(layer(x), expected)


def test_a_packed_copy_is_not_moved() -> None:
    """It would take memory where it is of no use."""
    layer = Int8Linear.from_linear(torch.nn.Linear(48, 20))
    shape, moved = layer._packed.shape, []

    def to_meta(tensor: Tensor) -> Tensor:
        moved.append(tensor.shape)
        return tensor.to("meta")

    layer._apply(to_meta)
    assert shape not in moved
    assert layer._packed.is_meta
    layer = Int8Linear.from_linear(torch.nn.Linear(48, 20))
    packed = layer._packed
    assert layer.half()._packed is packed
    assert layer.share_memory()._packed.is_shared()


@pytest.fixture
def gpu(triton_device: str) -> torch.device:
    if triton_device != "cuda":
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["dynamic", "static", None])
def test_layer_to_a_gpu_and_back(gpu: torch.device, activation: Any) -> None:
    linear = torch.nn.Linear(200, 136)
    scale = 0.05 if activation == "static" else None
    config = Int8(activation=activation, rotation=activation is not None)
    layer = Int8Linear.from_linear(linear, config, input_scale=scale)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(9, 200)
    expected = layer(x)
    held = torch.cuda.memory_allocated(gpu)
    layer.to(gpu)
    assert layer._packed is None
    assert torch.cuda.memory_allocated(gpu) - held < 2 * layer.qweight.numel()
    y = layer(x.to(gpu))
    if activation is not None:
        assert_same_bits(y.cpu(), expected)
    layer.to("cpu")
    assert layer._packed is not None
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, before[name])
    assert_same_bits(layer(x), expected)


def _calls(gpu: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Every form on the GPU: few rows, split K, many rows; quantized and weight-only."""
    calls = {}
    for mode in ("dynamic", "weight_only"):
        for m in (1, 4, 16, 64, 200, 700):
            inputs = on(
                str(gpu), linear_inputs(LinearCase(m, 2048, 512, "calls"), torch.bfloat16, mode, "gelu")
            )
            args = inputs.args[1:]
            calls[f"{mode} {m}"] = (lambda x, args=args: OP(x, *args, None, "triton"), inputs.x)
    return calls


@pytest.mark.gpu
def test_cuda_graphs(gpu: torch.device) -> None:
    for call, x in _calls(gpu).values():
        expected = call(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph, held = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            y = call(held)
        for _ in range(3):
            held.zero_()
            graph.replay()
            held.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(y, expected)


@pytest.mark.gpu
def test_other_streams_and_no_synchronisation(gpu: torch.device) -> None:
    calls = _calls(gpu)
    expected = {name: call(x) for name, (call, x) in calls.items()}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for i, (name, (call, x)) in enumerate(calls.items()):
            streams[i % 4].wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(streams[i % 4]):
                results.append((name, call(x)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for name, y in results:
        assert_same_bits(y, expected[name])


@pytest.mark.gpu
def test_every_gpu(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = on("cuda:1", linear_inputs(LinearCase(40, 128, 96, "second GPU"), torch.bfloat16))
    y = run(inputs)
    assert y.device == torch.device("cuda:1")
    check(y, inputs)
    assert torch.cuda.current_device() == gpu.index


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 64])
def test_compiles_without_breaks(gpu: torch.device, m: int) -> None:
    layer = Int8Linear.from_linear(torch.nn.Linear(256, 128)).to(gpu)
    x = torch.randn(m, 256, device=gpu)
    with torch.no_grad():
        assert_same_bits(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(gpu: torch.device) -> None:
    free, _ = torch.cuda.mem_get_info(gpu)
    if free < 20 << 30:
        pytest.skip(f"needs 20 GiB of GPU memory, {free >> 30} are free")
    m, k, n = 70000, 32, 33000  # the output
    x = torch.randn(m, k, device=gpu, dtype=torch.bfloat16)
    qweight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=gpu)
    scale = torch.rand(n, device=gpu)
    for weight_only in (False, True):
        y = OP(x, qweight, scale, None, None, weight_only, None, None, "triton")
        last = OP(x[-40:], qweight, scale, None, None, weight_only, None, None, "reference")
        if weight_only:  # sums in another order; one rounding of numbers of some hundreds
            torch.testing.assert_close(y[-40:], last, rtol=2 * UNIT_ROUNDOFF[torch.bfloat16], atol=0.01)
        else:
            assert_same_bits(y[-40:], last)
        del y
    n, k = 40000, 65536  # the weight
    qweight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=gpu)
    scale, x = torch.rand(n, device=gpu), torch.randn(2, k, device=gpu)
    for m in (1, 2):
        y = OP(x[:m], qweight, scale, None, None, False, None, None, "triton")
        assert_same_bits(y[:, -50:], OP(x[:m], qweight[-50:], scale[-50:], backend="reference"))
