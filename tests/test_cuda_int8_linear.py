"""The CUDA kernels of ``int8_linear``, on a GPU or in the emulator: the reference's bits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os

import pytest
import torch
from torch import Tensor

from lissom import _cuda, formats
from lissom.ops import int8_linear
from lissom.ops.int8_linear import _run_cuda
from lissom.testing import (
    ACT_FN_ERROR,
    ACT_FN_LIPSCHITZ,
    ACT_FNS,
    DTYPES,
    EXACT_ACT_FNS,
    LINEAR_CASES,
    MODES,
    ROW_KINDS,
    VIEWS,
    LinearCase,
    LinearInputs,
    assert_same_bits,
    assert_within,
    float_tolerance,
    linear_inputs,
    weight_only_bound,
)

pytestmark = pytest.mark.cuda

OP = torch.ops.lissom.int8_linear.default

ROWS, TILE_64, TILE_128, TILE_256, HOPPER, FLOAT_ROWS, FLOAT_TILE_64 = range(7)
"""``Int8Form`` in ``csrc/cuda/int8_linear.h``."""

HALVES = (torch.bfloat16, torch.float16)


def on(device: str, inputs: LinearInputs) -> LinearInputs:
    moved = {
        field.name: value.to(device) if isinstance(value := getattr(inputs, field.name), Tensor) else value
        for field in dataclasses.fields(inputs)
    }
    return LinearInputs(**moved)


def run(inputs: LinearInputs, rotated: bool = False, backend: str = "cuda") -> Tensor:
    y: Tensor = OP(*inputs.args, None, backend, rotated)
    return y


def forced(inputs: LinearInputs, form: int, splits: int = 0, rotated: bool = False) -> Tensor:
    """The result of a form of the caller's choice."""
    return _run_cuda(*inputs.args, None, rotated, form, splits)


def check(y: Tensor, inputs: LinearInputs, rotated: bool = False) -> None:
    """Bits where quantized, otherwise the bound that holds for float32 sums in any order."""
    if not inputs.weight_only:
        assert_same_bits(y, run(inputs, rotated, "reference"))
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


# ------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [c for c in LINEAR_CASES if c.m * c.k < 100_000], ids=str)
def test_every_shape(cuda_device: str, case: LinearCase, mode: str) -> None:
    dtype = DTYPES[sum(case[:3]) % len(DTYPES)]
    act_fn = ACT_FNS[(sum(case[:3]) + len(mode)) % len(ACT_FNS)]
    inputs = on(cuda_device, linear_inputs(case, dtype, mode, act_fn))
    y = run(inputs)
    assert y.shape == (case.m, case.n)
    check(y, inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mode", [*MODES, "rotated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option(cuda_device: str, dtype: torch.dtype, mode: str, bias: bool) -> None:
    for i, case in enumerate(
        (LinearCase(2, 48, 20, ""), LinearCase(11, 96, 37, ""), LinearCase(19, 45, 9, ""))
    ):
        for act_fn in ACT_FNS[i % 2 :: 2]:
            inputs = on(cuda_device, linear_inputs(case, dtype, mode, act_fn, bias=bias))
            check(run(inputs, mode == "rotated"), inputs, mode == "rotated")


# ------------------------------------------------------------------------------------------- every form

FORMS = [
    *[(ROWS, mode, dtype) for mode, dtype in zip(("dynamic", "static", "rotated"), DTYPES, strict=True)],
    *[(ROWS, "weight_only", dtype) for dtype in HALVES],
    (FLOAT_ROWS, "weight_only", torch.float32),
]


@pytest.mark.parametrize(("form", "mode", "dtype"), FORMS, ids=str)
def test_rows(cuda_device: str, form: int, mode: str, dtype: torch.dtype) -> None:
    """One row to 16; K in one batch of loads, in several of each slice, in several stretches of x."""
    for m, k, n in ((1, 64, 5), (3, 528, 9), (4, 1600, 70), (5, 1040, 24), (9, 2064, 17), (16, 4624, 11)):
        inputs = on(cuda_device, linear_inputs(LinearCase(m, k, n, ""), dtype, mode, "silu"))
        check(forced(inputs, form, rotated=mode == "rotated"), inputs, mode == "rotated")


@pytest.mark.parametrize("m", [2, 6])
def test_rows_longer_than_shared_memory_holds(cuda_device: str, m: int) -> None:
    """A block takes x a stretch at a time."""
    inputs = on(cuda_device, linear_inputs(LinearCase(m, 80 * 512 + 48, 70, ""), torch.bfloat16))
    check(forced(inputs, ROWS), inputs)


def test_slices_of_few_rows(cuda_device: str) -> None:
    """The share of K that a warp takes depends on N and on the multiprocessors."""
    if cuda_device == "cuda":
        pytest.skip("the emulator can be told how many there are")
    emulator = _cuda.load()
    inputs = linear_inputs(LinearCase(3, 1200, 130, ""), torch.float16, act_fn="gelu")
    try:
        for multiprocessors in (1, 2, 4, 132):
            emulator.device(80, multiprocessors)
            check(run(inputs), inputs)
    finally:
        emulator.device(80, 4)


@pytest.mark.parametrize(
    ("form", "mode", "dtype"),
    [
        (TILE_64, "dynamic", torch.float32),
        (TILE_64, "weight_only", torch.float16),
        (TILE_128, "static", torch.bfloat16),
        (TILE_128, "weight_only", torch.bfloat16),
        (TILE_256, "rotated", torch.float16),
    ],
    ids=str,
)
def test_tiles(cuda_device: str, form: int, mode: str, dtype: torch.dtype) -> None:
    """Fewer columns of K than the stages hold, more; splits that end unevenly; edges of tiles."""
    for m, k, n, splits in ((3, 16, 5, 1), (130, 336, 66, 1), (17, 720, 259, 5), (65, 400, 130, 3)):
        inputs = on(cuda_device, linear_inputs(LinearCase(m, k, n, ""), dtype, mode, "relu", seed=splits))
        y = forced(inputs, form, splits, mode == "rotated")
        check(y, inputs, mode == "rotated")
        assert_same_bits(forced(inputs, form, splits, mode == "rotated"), y)


def has_hopper(device: str) -> bool:
    """Whether Hopper's form runs: in the emulator, or on such a GPU where it is allowed to."""
    if device == "cpu":
        return True
    return torch.cuda.get_device_capability() == (9, 0) and os.environ.get("LISSOM_CUDA_HOPPER") != "0"


def test_hopper(cuda_device: str) -> None:
    """wgmma, TMA and clusters: fewer columns of K than the stages hold, more; edges of tiles."""
    if not has_hopper(cuda_device):
        pytest.skip("needs a Hopper GPU, and LISSOM_CUDA_HOPPER not 0")
    shapes = [(1, 16, 8), (130, 336, 20), (70, 784, 300)]
    if cuda_device == "cuda":
        shapes += [(257, 1040, 520), (1000, 4096, 4120), (3000, 528, 9000)]
    modes = ("dynamic", "static", "rotated")
    for (m, k, n), mode, dtype in zip(shapes, itertools.cycle(modes), itertools.cycle(DTYPES), strict=False):
        inputs = on(cuda_device, linear_inputs(LinearCase(m, k, n, ""), dtype, mode, "gelu"))
        expected = run(inputs, mode == "rotated", "reference")
        for _ in range(5 if cuda_device == "cuda" else 1):
            assert_same_bits(forced(inputs, HOPPER, rotated=mode == "rotated"), expected)


def test_hopper_takes_tile_after_tile(cuda_device: str) -> None:
    """A block's stages go on from tile to tile, also where K has fewer of them than there are."""
    if not has_hopper(cuda_device):
        pytest.skip("needs a Hopper GPU, and LISSOM_CUDA_HOPPER not 0")
    if cuda_device == "cpu":
        _cuda.load().device(90, 1)
    try:
        for m, k, n in ((300, 80, 30), (20, 656, 520)):
            inputs = on(cuda_device, linear_inputs(LinearCase(m, k, n, ""), torch.bfloat16))
            check(forced(inputs, HOPPER), inputs)
    finally:
        if cuda_device == "cpu":
            _cuda.load().device(80, 4)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_splits_of_unaligned_rows(cuda_device: str, mode: str) -> None:
    for dtype in DTYPES:
        inputs = on(cuda_device, linear_inputs(LinearCase(20, 389, 70, ""), dtype, mode))
        check(
            forced(inputs, FLOAT_TILE_64 if mode[0] == "w" and dtype == torch.float32 else TILE_64, 3), inputs
        )


def test_many_tiles_meet_in_groups(cuda_device: str) -> None:
    """More rows of tiles than a group has: every tile is computed once."""
    inputs = on(cuda_device, linear_inputs(LinearCase(64 * 9 + 3, 16, 64 * 2 + 1, ""), torch.bfloat16))
    check(forced(inputs, TILE_64), inputs)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_every_kind_of_row(cuda_device: str, kind: str) -> None:
    forms = itertools.product((2, 7, 18), (*MODES, "rotated"))
    for i, (m, mode) in enumerate(forms):
        dtype = DTYPES[(i + ROW_KINDS.index(kind)) % len(DTYPES)]
        inputs = on(cuda_device, linear_inputs(LinearCase(m, 80, 20, ""), dtype, mode, None, kind=kind))
        check(run(inputs, mode == "rotated"), inputs, mode == "rotated")


def test_every_weight_is_exact_in_sixteen_bits(cuda_device: str) -> None:
    """Also -128, which no quantizer makes, but a file may hold."""
    weight = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).to(cuda_device)
    ones = torch.ones(256, device=cuda_device)
    for dtype in HALVES:
        for m in (1, 17):
            x = torch.zeros(m, 16, dtype=dtype, device=cuda_device)
            for place in (0, 7, 10, 13):
                x.zero_()[:, place] = 1.0
                qweight = torch.full((256, 16), 77, dtype=torch.int8, device=cuda_device)
                qweight[:, place] = weight
                y = OP(x, qweight, ones, None, None, True, None, None, "cuda")
                assert_same_bits(y, weight.to(dtype).expand(m, 256).contiguous())


def test_extreme_sums(cuda_device: str) -> None:
    """All |q| = 127 with every combination of signs; the largest K."""
    for m, k in ((2, 4112), (4, 4099), (17, 2064)):
        signs = torch.tensor([[1.0], [-1.0]]).repeat(10, k)[:m]
        qweight = (signs * 127).to(cuda_device, torch.int8)
        ones = torch.ones(m, device=cuda_device)
        x = (signs * 3).to(cuda_device)
        assert_same_bits(OP(x, qweight, ones, backend="cuda"), OP(x, qweight, ones, backend="reference"))
    k = formats.INT8_MAX_IN_FEATURES // 16 * 16
    x = torch.ones(1, k, device=cuda_device)
    qweight = torch.full((3, k), 127, dtype=torch.int8, device=cuda_device)
    qweight[1] = -127
    y = OP(x, qweight, torch.ones(3, device=cuda_device), backend="cuda")
    assert_same_bits(y, OP(x, qweight, torch.ones(3, device=cuda_device), backend="reference"))


# ------------------------------------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [2, 14, 18])
def test_a_row_with_nan_or_infinity_is_nan(cuda_device: str, m: int, bad: float) -> None:
    for mode, dtype in zip(("dynamic", "static", "rotated"), DTYPES, strict=True):
        inputs = on(cuda_device, linear_inputs(LinearCase(m, 48, 18, ""), dtype, mode, "relu", kind="normal"))
        clean = run(inputs, mode == "rotated")
        inputs.x[1, 36] = bad
        y = run(inputs, mode == "rotated")
        assert bool(y[1].isnan().all())
        good = [i for i in range(m) if i != 1]
        assert_same_bits(y[good], clean[good])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [1, 14, 18])
def test_weight_only_carries_nan_and_infinity(cuda_device: str, m: int, bad: float) -> None:
    for dtype in DTYPES:
        case = LinearCase(m, 48, 18, "bad rows")
        inputs = on(cuda_device, linear_inputs(case, dtype, "weight_only", None, kind="normal"))
        clean = run(inputs)
        inputs.x[0, 36] = bad
        y = run(inputs)
        assert not bool(y[0].isfinite().any())
        assert_same_bits(y[1:], clean[1:])


def test_overflow_of_float16_output_is_infinite(cuda_device: str) -> None:
    x = torch.full((1, 64), 60000.0, dtype=torch.float16, device=cuda_device)
    qweight = torch.full((2, 64), 127, dtype=torch.int8, device=cuda_device)
    y = OP(x, qweight, torch.tensor([1.0, -1.0], device=cuda_device), backend="cuda")
    assert y.tolist() == [[math.inf, -math.inf]]


# ------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_of_x(cuda_device: str, view: str) -> None:
    for k in (37, 48):
        for mode, dtype in (("dynamic", torch.float32), ("weight_only", torch.float16)):
            inputs = on(cuda_device, linear_inputs(LinearCase(20, k, 18, ""), dtype, mode))
            for rows in (20, 4):
                x = VIEWS[view](inputs.x).flatten(0, -2)[:rows]
                y = run(dataclasses.replace(inputs, x=x))
                check(y, dataclasses.replace(inputs, x=x.contiguous()))


def test_few_rows_that_lie_anywhere(cuda_device: str) -> None:
    """Rows that start at no multiple of 16 bytes are quantized before, not by each block."""
    for dtype in DTYPES:
        inputs = on(cuda_device, linear_inputs(LinearCase(3, 64, 18, ""), dtype))
        x = torch.cat([inputs.x.new_zeros(1), inputs.x.flatten()])[1:].view(3, 64)
        for rotated in (False, True):
            seen = dataclasses.replace(inputs, x=x)
            check(forced(seen, ROWS, rotated=rotated), seen, rotated)


@pytest.mark.parametrize("mode", MODES)
def test_expanded_x(cuda_device: str, mode: str) -> None:
    inputs = on(cuda_device, linear_inputs(LinearCase(20, 48, 18, ""), torch.float32, mode))
    for x in (inputs.x[:1].expand(13, 48), inputs.x[:, :1].expand(20, 48), inputs.x[0].expand(3, 2, 48)):
        y = run(dataclasses.replace(inputs, x=x))
        assert_same_bits(y, run(dataclasses.replace(inputs, x=x.contiguous())))


@pytest.mark.parametrize("m", [1, 6, 20])
def test_other_arguments_of_any_strides(cuda_device: str, m: int) -> None:
    for mode in MODES:
        inputs = on(cuda_device, linear_inputs(LinearCase(m, 64, 18, ""), torch.bfloat16, mode))
        assert inputs.bias is not None
        wide = torch.cat([inputs.qweight, inputs.qweight[:, :32]], dim=1)
        odd = torch.cat([inputs.qweight[0, :1], inputs.qweight.flatten()])[1:].view(18, 64)
        offset = torch.cat([inputs.qweight, inputs.qweight[:, :1]], dim=1)
        weights = (inputs.qweight.t().contiguous().t(), wide[:, :64], odd, offset[:, :64])
        biases = (
            torch.stack([inputs.bias, inputs.bias * 0], 1)[:, 0],
            inputs.bias.float(),
            None,
            inputs.bias,
        )
        scale = torch.stack([inputs.weight_scale, inputs.weight_scale * 0], 1)[:, 0]
        for qweight, bias in zip(weights, biases, strict=True):
            changed = dataclasses.replace(inputs, qweight=qweight, weight_scale=scale, bias=bias)
            check(run(changed), changed)


@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (0, 37), (3, 0, 37)])
def test_leading_dimensions(cuda_device: str, shape: tuple[int, ...]) -> None:
    inputs = on(cuda_device, linear_inputs(LinearCase(6, 37, 18, "leading"), torch.float32))
    count = math.prod(shape[:-1])
    y = run(dataclasses.replace(inputs, x=inputs.x[:count].reshape(shape)))
    assert y.shape == (*shape[:-1], 18)
    assert_same_bits(y.reshape(count, 18), run(dataclasses.replace(inputs, x=inputs.x[:count])))


@pytest.mark.parametrize("scale", [1e-30, 3e-39, 0.25, 1e30])
def test_static_scales_of_any_magnitude_and_shape(cuda_device: str, scale: float) -> None:
    for m in (1, 18):
        inputs = on(cuda_device, linear_inputs(LinearCase(m, 48, 19, ""), torch.float32, "static"))
        for shape in ((), (1, 1)):
            given = dataclasses.replace(inputs, input_scale=torch.full(shape, scale, device=cuda_device))
            check(run(given), given)


# ------------------------------------------------------------------------------------------- arguments


def test_bad_arguments(cuda_device: str) -> None:
    x = torch.zeros(2, 20, device=cuda_device)
    q = torch.zeros(3, 20, dtype=torch.int8, device=cuda_device)

    def call(x_stride: int = 20, m: int = 2, k: int = 20, weight_stride: int = 20, mode: int = 0) -> None:
        weight = (q.data_ptr(), weight_stride, 3, 0)
        _cuda.call(
            "int8_linear", x, x.data_ptr(), 0, x_stride, m, k, *weight, 0, 0, mode, 0, False, 0, -1, 0, 0, 0
        )

    call()
    with pytest.raises(ValueError, match=r"int8_linear: x_stride=10 is less than k=20"):
        call(x_stride=10)
    with pytest.raises(ValueError, match=r"int8_linear: weight_stride=19 is less than k=20"):
        call(weight_stride=19)
    with pytest.raises(ValueError, match=r"int8_linear: input_scale is what static mode needs"):
        call(mode=1)
    with pytest.raises(ValueError, match=r"int8_linear: negative size"):
        call(m=-1)
    inputs = on(cuda_device, linear_inputs(LinearCase(20, 37, 18, ""), torch.float32))
    with pytest.raises(ValueError, match=r"int8_linear: form 2 needs rows on multiples of 16 bytes"):
        forced(inputs, TILE_128)
    inputs = on(cuda_device, linear_inputs(LinearCase(20, 48, 18, ""), torch.float32))
    with pytest.raises(ValueError, match=r"int8_linear: form 0 serves up to 16 rows, not 20"):
        forced(inputs, ROWS)
    with pytest.raises(ValueError, match=r"int8_linear: form 6 is for other activations"):
        forced(inputs, FLOAT_TILE_64)
    inputs = on(cuda_device, linear_inputs(LinearCase(20, 48, 18, ""), torch.float16, "weight_only"))
    with pytest.raises(ValueError, match=r"int8_linear: form 4 is not compiled for .* not for this GPU"):
        forced(inputs, HOPPER)


def test_gradients(cuda_device: str) -> None:
    """As the reference's: backward is built on the op, which runs on the same backend."""
    inputs = on(cuda_device, linear_inputs(LinearCase(7, 32, 18, ""), torch.float32, "dynamic", "gelu"))
    assert inputs.bias is not None
    grads = []
    for backend in ("cuda", "reference"):
        x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
        y = int8_linear(x, inputs.qweight, inputs.weight_scale, bias, act_fn="gelu", backend=backend)
        grads.append(torch.autograd.grad(y.sum(), (x, bias)))
    for ours, theirs in zip(*grads, strict=True):
        assert_same_bits(ours, theirs)


# ------------------------------------------------------------------------------------------- on a GPU only


@pytest.fixture
def gpu(cuda_device: str) -> torch.device:
    if cuda_device != "cuda":
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())


def _calls(gpu: torch.device) -> dict[str, LinearInputs]:
    """Every form: few rows, split K, many rows; quantized and weight-only."""
    return {
        f"{mode} {m}": on(
            str(gpu), linear_inputs(LinearCase(m, 2048, 512, ""), torch.bfloat16, mode, "gelu", kind="normal")
        )
        for mode in ("dynamic", "weight_only")
        for m in (1, 4, 16, 64, 200, 700)
    }


@pytest.mark.gpu
def test_cuda_graphs(gpu: torch.device) -> None:
    for inputs in _calls(gpu).values():
        expected = run(inputs)
        check(expected, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(inputs)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert_same_bits(y, expected)


@pytest.mark.gpu
def test_other_streams_and_no_synchronisation(gpu: torch.device) -> None:
    calls = _calls(gpu)
    expected = {name: run(inputs) for name, inputs in calls.items()}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for i, (name, inputs) in enumerate(calls.items()):
            streams[i % 4].wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(streams[i % 4]):
                results.append((name, run(inputs)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for name, y in results:
        assert_same_bits(y, expected[name])


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
    y = OP(x, qweight, scale, None, None, False, None, None, "cuda")
    assert_same_bits(y[-40:], OP(x[-40:], qweight, scale, backend="reference"))
    del y
    n, k = 40000, 65536  # the weight
    qweight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=gpu)
    scale, x = torch.rand(n, device=gpu), torch.randn(20, k, device=gpu)
    for m in (1, 9, 20):
        y = OP(x[:m], qweight, scale, backend="cuda")
        assert_same_bits(y[:, -50:], OP(x[:m], qweight[-50:], scale[-50:], backend="reference"))
