"""The emulator that runs csrc/cuda without a GPU: its instructions by the PTX ISA's formulas, its errors.

What kernels compute is tested in ``test_cuda_<op>.py``; here all of that runs once more under ASan and UBSan.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_emulator.build as build
import pytest
import torch
from torch import Tensor

from lissom import _native
from lissom.reference.numerics import apply_activation
from lissom.testing import ACT_FNS, assert_same_bits

FLOATS = {0: torch.bfloat16, 1: torch.float16}
INT8 = 2


@pytest.fixture(params=[0, 1, 2], ids=["in_order", "shuffled", "shuffled_again"])
def emulator(request: pytest.FixtureRequest) -> ModuleType:
    module = build.load()
    module.seed(request.param)
    return module


def words(elements: Tensor) -> Tensor:
    """Neighbours along the last dimension as registers, lowest first."""
    return elements.contiguous().view(torch.int32)


@pytest.mark.parametrize("kind", [0, 1, INT8], ids=["bfloat16", "float16", "int8"])
def test_mma(emulator: ModuleType, kind: int) -> None:
    """PTX ISA, "Matrix fragments for mma.m16n8k16" and "… mma.m16n8k32": row and col of each element.

    groupID = lane >> 2, threadID_in_group = lane % 4.
    """
    if kind == INT8:
        depth, each = 32, 4
        a = torch.randint(-128, 128, (16, depth), dtype=torch.int8)
        b = torch.randint(-128, 128, (depth, 8), dtype=torch.int8)
        c = torch.randint(-(2**30), 2**30, (16, 8), dtype=torch.int32)
        expected = (c.long() + a.long() @ b.long()).int()
    else:
        depth, each = 16, 2
        a, b = (torch.randint(-32, 32, shape).to(FLOATS[kind]) for shape in ((16, depth), (depth, 8)))
        c = torch.randint(-1000, 1000, (16, 8)).float()
        expected = c + a.float() @ b.float()
    ra = torch.empty(32, 4, each, dtype=a.dtype)
    rb = torch.empty(32, 2, each, dtype=a.dtype)
    rows, columns = torch.empty(32, 4, dtype=torch.long), torch.empty(32, 4, dtype=torch.long)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4 * each):  # ai of the ISA, in order
            row = group if i // each % 2 == 0 else group + 8
            column = thread * each + i % each + (0 if i < 2 * each else depth // 2)
            ra[lane, i // each, i % each] = a[row, column]
        for i in range(2 * each):
            row = thread * each + i % each + (0 if i < each else depth // 2)
            rb[lane, i // each, i % each] = b[row, group]
        for i in range(4):
            rows[lane, i] = group if i < 2 else group + 8
            columns[lane, i] = thread * 2 + (i & 1)
    d = c[rows, columns].contiguous()
    emulator.selftest_mma(kind, words(ra).data_ptr(), words(rb).data_ptr(), d.data_ptr())
    assert_same_bits(d, expected[rows, columns])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(emulator: ModuleType, count: int, transpose: bool) -> None:
    """PTX ISA, "ldmatrix": rows by lane / 4, pairs of elements by lane % 4."""
    data = torch.randint(-(2**15), 2**15, (32, 8), dtype=torch.int16)
    rows = torch.randperm(32).int()
    r = torch.empty(32, count, 2, dtype=torch.int16)
    emulator.selftest_ldmatrix(count, transpose, data.data_ptr(), rows.data_ptr(), r.data_ptr())
    for lane, i, e in itertools.product(range(32), range(count), range(2)):
        matrix = data[rows[8 * i : 8 * i + 8].long()]
        matrix = matrix.t() if transpose else matrix
        assert r[lane, i, e] == matrix[lane // 4, 2 * (lane % 4) + e]


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("by", [1, 3, 5])
def test_shuffles(emulator: ModuleType, by: int, width: int) -> None:
    v = torch.randint(-1000, 1000, (32,), dtype=torch.int32)
    out = torch.empty(7, 32, dtype=torch.int32)
    emulator.selftest_shuffle(v.data_ptr(), by, width, out.data_ptr())
    for lane in range(32):
        base, me = lane // width * width, lane % width
        assert out[0, lane] == v[base + me - by if me >= by else lane]
        assert out[1, lane] == v[base + me + by if me + by < width else lane]
        assert out[2, lane] == v[base + (me ^ by)]
        assert out[3, lane] == v[base + by % width]
    assert out[4].unique().tolist() == [int(v.sum())]
    assert out[5].unique().tolist() == [int(v.max())]
    assert out[6].unique().tolist() == [torch.tensor(sum(int(v[i] & 1) << i for i in range(32))).int().item()]


def test_copies_barriers_and_the_last_block(emulator: ModuleType) -> None:
    blocks, pieces = 5, 7
    x = torch.randint(-100, 100, (blocks, pieces, 128)).float()
    partial, counter, total = torch.zeros(blocks), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    emulator.selftest_sum(
        x.data_ptr(), blocks, pieces, partial.data_ptr(), counter.data_ptr(), total.data_ptr()
    )
    assert partial.tolist() == x.sum((1, 2)).tolist()
    assert total.item() == x.sum().item()


def test_named_barriers(emulator: ModuleType) -> None:
    out = torch.empty(5, 64, dtype=torch.int32)
    emulator.selftest_named_barrier(5, out.data_ptr())
    assert out.tolist() == [[100 * i + 63 - t for t in range(64)] for i in range(5)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_clusters(emulator: ModuleType, size: int) -> None:
    """Blocks see each other's shared memory, and wait for each other."""
    out = torch.zeros(8, 64)
    emulator.selftest_cluster(8, size, out.data_ptr())
    expected = torch.arange(8 * 64.0).view(8 // size, size, 64).roll(-1, 1).view(8, 64)
    assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="cluster: invalid configuration"):
        emulator.selftest_cluster(9, 2, out.data_ptr())


def test_conversions() -> None:
    emulator = build.load()
    edges = torch.tensor(
        [0.0, -0.0, 65504, 65519.9, 65520, 1e-8, 6e-8, 2.9e-8, 3.0e-8, 6.1e-5, 3.4e38, 1e-40]
    )
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    bits = torch.randint(-(2**31), 2**31, (200000,)).int().view(torch.float32)
    for values in (edges, -edges, special, bits, torch.randn(100000) * 1e-5, torch.randn(100000) * 1e4):
        for kind, dtype in FLOATS.items():
            out = torch.empty(values.shape, dtype=dtype)
            emulator.selftest_convert(kind, values.data_ptr(), values.numel(), out.data_ptr())
            assert_same_bits(out, values.to(dtype))
    for kind, dtype in FLOATS.items():
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        out = torch.empty(every.shape)
        emulator.selftest_widen(kind, every.data_ptr(), every.numel(), out.data_ptr())
        assert_same_bits(out, every.float())


def test_larger_of_pairs() -> None:
    """A number where the other one is NaN, as the PTX ISA has it for ``max``."""
    emulator = build.load()
    for kind, dtype in FLOATS.items():
        a, b = (torch.randn(2000).to(dtype) for _ in range(2))
        a[:3], b[1:4] = float("nan"), float("nan")
        a[5], b[6] = float("inf"), -float("inf")
        larger = torch.empty_like(a)
        emulator.selftest_max2(kind, a.data_ptr(), b.data_ptr(), 1000, larger.data_ptr())
        assert_same_bits(larger, torch.fmax(a, b))


def test_exp2() -> None:
    """As far off as CUDA allows: up and down."""
    emulator = build.load()
    x = torch.cat([torch.linspace(-126, 0, 5000), torch.tensor([0.0, 1.0, -126.5, -200, -float("inf")])])
    x = torch.cat([x, torch.tensor([float("nan")])])
    y = torch.empty_like(x)
    emulator.selftest_exp2(x.data_ptr(), x.numel(), y.data_ptr())
    assert y[5000] == 1
    assert y[5002:5005].tolist() == [0, 0, 0]
    assert y[5005].isnan()
    error = (y.double() / x.double().exp2() - 1)[:5000]
    assert error.abs().max() <= 2.0**-22 * 1.3
    assert (error > 2.0**-23).any()
    assert (error < -(2.0**-23)).any()


@pytest.mark.parametrize("act_fn", [a for a in ACT_FNS if a])
def test_activation_functions(act_fn: str) -> None:
    emulator = build.load()
    x = torch.cat([torch.randn(3000) * 5, torch.randn(1000) * 100, torch.linspace(-0.1, 0.1, 1001)])
    x[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    y = torch.empty_like(x)
    emulator.selftest_activate(_native.ACTIVATIONS[act_fn], x.data_ptr(), x.numel(), y.data_ptr())
    assert_same_bits(y, apply_activation(x, act_fn))


def test_bit_functions() -> None:
    emulator = build.load()
    a, b, c = 0xF0A51234, 0x0F5AC3D2, 0x00FF7654
    assert emulator.selftest_bits(a, b, c) == (
        (a & b) | c,
        (a & b) ^ c,
        (a & b) | (~a & c),
        int.from_bytes(
            bytes((*a.to_bytes(4, "little"), *b.to_bytes(4, "little"))[i] for i in (4, 5, 6, 7)), "little"
        ),
    )


FAULTS = {
    2: r"divergence: thread \d+ \(warp \d, lane \d+\) waits at (__syncwarp|__shfl_sync), "
    r".*selftest_kernel.cuh:\d+, but thread \d+ .* waits at (__syncwarp|__shfl_sync)",
    3: r"deadlock(\n  thread \d+ .* waits at (__syncthreads|named_barrier_sync).*){8}\n  and 56 more",
    4: r"divergence: thread \d+ .* comes to __syncthreads, .*, but thread \d+ .* waits at __syncthreads",
    5: r"(deadlock\n  thread 0|thread \d+ .* waits at __shfl_xor_sync.*, but thread 9 .* has returned)",
    6: r"ldmatrix_x2 at an address that is no multiple of 16",
    8: r"cp.async outside of shared memory",
    9: r"spins for ever at load_acquire",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_errors(emulator: ModuleType, fault: int) -> None:
    out = torch.zeros(256)
    with pytest.raises(RuntimeError, match=rf"(?s)fault: block \(0, 0, 0\): .*{FAULTS[fault]}"):
        emulator.selftest_fault(fault, out.data_ptr())
    test_named_barriers(emulator)  # the next launch starts afresh


@pytest.mark.parametrize("fault", [0, 1], ids=["never written", "copy not waited for"])
def test_what_is_not_there_is_nan(emulator: ModuleType, fault: int) -> None:
    out = torch.zeros(64)
    emulator.selftest_fault(fault, out.data_ptr())
    assert out.isnan().all()


def test_a_missing_barrier_shows() -> None:
    emulator = build.load()
    wrong = 0
    for seed in range(3):
        emulator.seed(seed)
        out = torch.zeros(64)
        emulator.selftest_fault(7, out.data_ptr())
        wrong += out.isnan().any().item()
    assert wrong == 3


def test_under_sanitizers() -> None:
    """All tests that use the emulator once more, threads in order, with addresses and undefined behaviour
    watched."""
    if os.environ.get(build.SANITIZE):
        pytest.skip("this is the process under sanitizers")
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here")
    files = sorted(Path(__file__).parent.glob("test_cuda_*.py"))
    files = [f for f in files if f.name != "test_cuda_compile.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not shuffled"]
    command += map(str, files)
    done = subprocess.run(
        command, capture_output=True, text=True, env=build.sanitized_environment(), cwd=build.ROOT
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_sanitizers_see_what_is_out_of_bounds() -> None:
    if os.environ.get(build.SANITIZE):
        pytest.skip("this is the process under sanitizers")
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import cuda_emulator.build as build
out = torch.zeros(64)
build.load().selftest_fault(10, out.data_ptr())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=build.sanitized_environment(),
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "selftest_kernel.cuh" in done.stderr


# ------------------------------------------------------------------------------------------- where things lie


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (8, 4), (17, 6), (40, 1), (1, 33)], ids=str)
def test_every_int8_tile_is_computed_once(sizes: tuple[int, int]) -> None:
    """Column by column through eight rows of tiles, or what is left of them."""
    down, across = sizes
    module = build.load()
    places = [module.int8_tile_place(tile, down, across) for tile in range(down * across)]
    assert len(set(places)) == down * across
    expected = [
        (row, column)
        for first in range(0, down, 8)
        for column in range(across)
        for row in range(first, min(first + 8, down))
    ]
    assert places == expected


@pytest.mark.parametrize("item_bytes", [1, 2])
def test_staged_rows_of_x(item_bytes: int) -> None:
    """Sixteen bytes each, every place taken once; rows of 64 columns one after the other."""
    row_bytes = 64 * item_bytes
    module = build.load()
    for row in range(64):
        found = [module.int8_staged_x_at(item_bytes, row, chunk) for chunk in range(row_bytes // 16)]
        assert sorted(found) == [row * row_bytes + 16 * chunk for chunk in range(row_bytes // 16)]


def test_rows_in_shared_memory() -> None:
    """What lies between their beginnings holds a row, and vectors of 16 bytes stay aligned."""
    module = build.load()
    for item_bytes in (1, 2, 4):
        for columns in (512, 1024, 4096):
            pitch = module.int8_rows_pitch(item_bytes, columns)
            assert columns <= pitch <= columns + 64
            assert pitch * item_bytes % 16 == 0


@pytest.mark.parametrize("width", [32, 64])
def test_scratch(width: int) -> None:
    """Every word of a row of sums is in that row, once; fours stay together, for they are read so."""
    module = build.load()
    for row in range(16):
        found = [module.scratch_at(width, row, column) for column in range(width)]
        assert sorted(found) == list(range(row * width, (row + 1) * width))
        for first in range(0, width, 4):
            assert found[first : first + 4] == list(range(found[first], found[first] + 4))
