"""The AVX-512 kernels on any x86-64, through SIMDe: correctness is proved here, speed is claimed nowhere.

Debian's libsimde-dev (header-only) emulates each intrinsic; CMake's ``LISSOM_SIMDE=ON`` builds the test-only
twin ``_C_simde``. Its ``avx512vnni`` is the source file that the real one is built from.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import one_at_a_time

from lissom import _native
from lissom.formats import block_sparse_to_dense, check_block_sparse
from lissom.reference import block_sparse_linear as block_sparse_page
from lissom.reference import int4_embedding as int4_embedding_page
from lissom.reference import int4_linear as int4_page
from lissom.reference import int8_embedding as embedding_page
from lissom.reference import int8_linear as page
from lissom.reference.distill_loss import DIVERGENCES
from lissom.testing import (
    ACT_FNS,
    BLOCK_SHAPES,
    DISTILL_KINDS,
    DTYPES,
    EMBEDDING_CASES,
    INT4_FORMS,
    INT4_MODES,
    LINEAR_CASES,
    MODES,
    BlockSparseCase,
    DistillCase,
    Int4Form,
    LinearCase,
    assert_same_bits,
    assert_within,
    block_sparse_inputs,
    distill_inputs,
    float_tolerance,
    force_isa,
    int4_inputs,
    int4_weights,
    linear_inputs,
    sum_bound,
)

ROOT = Path(__file__).resolve().parents[1]
OP = torch.ops.lissom.int8_linear.default


def build_simde_extension() -> ModuleType:
    """Configure and build ``_C_simde`` under ``build/simde-…`` (kept) and load it; skips where it cannot."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"SIMDe emulates AVX-512 here on x86-64 only, not on {platform.machine()}")
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("SIMDe's headers are not installed: apt-get install libsimde-dev")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the C++ sources are not beside the tests")
    cmake = shutil.which(
        "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if not cmake:
        pytest.skip("cmake is not installed")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the emulated extension")
    build = ROOT / "build" / f"simde-{sys.implementation.cache_tag}"
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(build)),
        "-DLISSOM_SIMDE=ON",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    build.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(build):
        for command in (configure, [cmake, "--build", str(build), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    (path,) = build.glob("_C_simde*.so")
    spec = importlib.util.spec_from_file_location("_C_simde", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return build_simde_extension()


@pytest.fixture
def emulated(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Every op of the test runs the emulated AVX-512 kernels."""
    monkeypatch.setattr(_native, "_load", lambda: (extension, ""))
    monkeypatch.setenv("LISSOM_BACKEND", "native")
    with force_isa("avx512vnni"):
        yield extension


def test_the_emulated_extension_runs_avx512vnni_anywhere(emulated: ModuleType) -> None:
    assert dict(emulated.isas())["avx512vnni"] is True
    assert _native.isa() == "avx512vnni"
    assert emulated.__name__ == "_C_simde"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case for case in LINEAR_CASES if case.m < 1000], ids=str)
def test_every_shape(emulated: ModuleType, case: LinearCase, mode: str) -> None:
    for i, dtype in enumerate(DTYPES):
        act_fn = ACT_FNS[(sum(case[:3]) + i) % len(ACT_FNS)]
        inputs = linear_inputs(case, dtype, mode, act_fn)
        y = OP(*inputs.args)
        if mode == "weight_only":
            with force_isa("scalar"):
                assert_same_bits(y, OP(*inputs.args))
        else:
            assert_same_bits(y, page.int8_linear(*inputs.args))


@pytest.mark.parametrize("act_fn", ACT_FNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_every_option(emulated: ModuleType, mode: str, dtype: torch.dtype, act_fn: str | None) -> None:
    for m in range(1, 27):  # every number of rows in a tile and of its remainder
        inputs = linear_inputs(LinearCase(m, 45, 37, ""), dtype, mode, act_fn, bias=bool(m % 2), seed=m)
        assert_same_bits(OP(*inputs.args), page.int8_linear(*inputs.args))


def test_every_16_bit_value(emulated: ModuleType) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1)
        args = (every, torch.tensor([[1]], dtype=torch.int8), torch.ones(1))
        assert_same_bits(OP(*args), page.int8_linear(*args))
        back = OP(*args, None, None, True)
        assert_same_bits(back, torch.where(every == 0, torch.zeros_like(every), every))


def test_rows_with_nan_or_infinity(emulated: ModuleType) -> None:
    inputs = linear_inputs(LinearCase(14, 37, 18, ""), kind="normal")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = inputs.x.clone()
        x[[2, 13], 36] = bad
        assert_same_bits(OP(x, *inputs.args[1:]), page.int8_linear(x, *inputs.args[1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "v", "d"), EMBEDDING_CASES)
def test_embedding(emulated: ModuleType, shape: tuple[int, ...], v: int, d: int, dtype: torch.dtype) -> None:
    qweight = torch.randint(-127, 128, (v, d), dtype=torch.int8)
    scale = torch.rand(v)
    indices = torch.randint(0, v, shape)
    y = torch.ops.lissom.int8_embedding.default(indices, qweight, scale, dtype)
    assert_same_bits(
        y, embedding_page.int8_embedding(indices.reshape(-1), qweight, scale, dtype).reshape(y.shape)
    )


INT4_OP = torch.ops.lissom.int4_linear.default


@pytest.mark.parametrize(
    ("form", "mode"),
    [(f, mode) for f in INT4_FORMS for mode in INT4_MODES if not (f.group_index and mode == "rotated")],
    ids=str,
)
def test_int4_every_form(emulated: ModuleType, form: Int4Form, mode: str) -> None:
    shapes = [(1, 300, 40), (3, 5, 7), (7, 129, 33), (12, 64, 16), (13, 300, 50), (100, 640, 17)]
    for i, (m, k, n) in enumerate(shapes):
        act_fn = ACT_FNS[i % len(ACT_FNS)]
        inputs = int4_inputs(LinearCase(m, k, n, ""), form, DTYPES[i % 3], mode, act_fn)
        y = INT4_OP(*inputs.args())
        if mode == "weight_only":
            with force_isa("scalar"):
                assert_same_bits(y, INT4_OP(*inputs.args()))
        else:
            assert_same_bits(y, int4_page.int4_linear(*inputs.page))


@pytest.mark.parametrize("form", [INT4_FORMS[0], INT4_FORMS[1], INT4_FORMS[8]], ids=str)
def test_int4_every_number_of_rows(emulated: ModuleType, form: Int4Form) -> None:
    for m in range(1, 27):  # every number of rows in a tile and of its remainder
        for n in (16, 45):  # one panel; two and one
            inputs = int4_inputs(LinearCase(m, 37, n, ""), form, seed=m)
            assert_same_bits(INT4_OP(*inputs.args()), int4_page.int4_linear(*inputs.page))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [f for f in INT4_FORMS if not f.codebook and not f.group_index], ids=str)
def test_int4_embedding(emulated: ModuleType, form: Int4Form, dtype: torch.dtype) -> None:
    table = int4_weights(9, 150, form)
    indices = torch.randint(0, 9, (2, 5))
    y = torch.ops.lissom.int4_embedding.default(
        indices, table.qweight, table.weight_scale, table.zero_point, 150, table.group_size, dtype
    )
    expected = int4_embedding_page.int4_embedding(indices.reshape(-1), table, dtype)
    assert_same_bits(y, expected.reshape(y.shape))


BLOCK_SPARSE_SIZES = [(1, 130, 70), (3, 45, 37), (7, 64, 64), (16, 33, 130), (33, 70, 24), (100, 40, 17)]


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_block_sparse_int8(emulated: ModuleType, block_shape: tuple[int, int]) -> None:
    for i, (m, k, n) in enumerate(BLOCK_SPARSE_SIZES):
        case, dtype, act_fn = BlockSparseCase(m, k, n, 0.4, ""), DTYPES[i % 3], ACT_FNS[i % len(ACT_FNS)]
        inputs = block_sparse_inputs(case, block_shape, torch.int8, dtype, act_fn)
        y = torch.ops.lissom.block_sparse_linear.default(*inputs.args())
        assert_same_bits(y, block_sparse_page.block_sparse_linear(*inputs.page))


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_block_sparse_float(
    emulated: ModuleType, block_shape: tuple[int, int], value_dtype: torch.dtype
) -> None:
    """The forward and both gradients, within the bound of float32 sums."""
    ops = torch.ops.lissom
    for i, (m, k, n) in enumerate(BLOCK_SPARSE_SIZES):
        case, dtype = BlockSparseCase(m, k, n, 0.4, ""), DTYPES[i % 3]
        inputs = block_sparse_inputs(case, block_shape, value_dtype, dtype, bias=False, kind="normal")
        x, w = inputs.x, inputs.weights
        weight, grad = block_sparse_to_dense(w).double(), torch.randn(m, n).to(dtype)
        indices = (w.crow_indices, w.col_indices)
        for actual, left, right in (
            (ops.block_sparse_linear.default(*inputs.args()), x, weight.t()),
            (ops.block_sparse_grad_input.default(grad, w.values, *indices, n, k), grad, weight),
        ):
            exact, bound = left.double() @ right, sum_bound(left, right, right.shape[0])
            assert_within(actual, exact, bound + float_tolerance(exact.abs() + bound, dtype))
        grad_values = replace(w, values=ops.block_sparse_grad_values.default(grad, x, *indices, *block_shape))
        check_block_sparse(grad_values)
        stored = block_sparse_to_dense(replace(w, values=torch.ones_like(w.values))).bool()
        exact, bound = grad.double().t() @ x.double(), sum_bound(grad.t(), x, m)
        assert_within(block_sparse_to_dense(grad_values)[stored], exact[stored], bound[stored])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", DISTILL_KINDS)
def test_distill_loss(emulated: ModuleType, kind: str, divergence: str) -> None:
    """The bits of the scalar kernels, which ``test_distill_loss.py`` holds to float64."""
    for i, (vocab, dtype) in enumerate(itertools.product((1, 15, 33, 1100), DTYPES)):
        inputs = distill_inputs(DistillCase(3, vocab, ""), dtype, kind=kind)
        terms = (
            (0.5, 0.1, divergence, 0.3, -100, 0.1, 9.0)
            if i % 2
            else (0.0, 0.0, divergence, 0.3, -100, 0.0, None)
        )
        args = (
            *(inputs.student, inputs.teacher, inputs.labels),
            2.0,
            1.0,
            *terms,
            1.0,
            1.5,
            "none",
            True,
            None,
        )
        loss, grad = torch.ops.lissom.distill_loss.default(*args)
        with force_isa("scalar"):
            expected = torch.ops.lissom.distill_loss.default(*args)
        assert_same_bits(loss, expected[0])
        assert_same_bits(grad, expected[1])
