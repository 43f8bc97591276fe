"""CUDA C++ kernels on GPUs whose blocks have 99 KB of shared memory, sm_86 and sm_89: every form they run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import cuda_emulator.build as cuda_emulator
import pytest
import test_cuda_block_sparse_linear as sparse
import test_cuda_int4_linear as int4
import test_cuda_int8_linear as int8
import test_distill_loss as cpu
import torch
from distill_checks import solve_on

from lissom import _cuda, testing
from lissom.testing import INT4_FORMS, DistillCase, LinearCase, linear_inputs

pytestmark = pytest.mark.cuda


@pytest.fixture(params=[4, 128])
def ada(cuda_device: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The emulator, which refuses launches with more than the GPU has, in small and in large."""
    if cuda_device == "cuda":
        pytest.skip("cuda: the emulator can be told what GPU it is")
    if os.environ.get(cuda_emulator.SANITIZE):
        pytest.skip("others reach the same code under sanitizers")
    _cuda.load().device(89, request.param)
    yield cuda_device
    _cuda.load().device(80, 4)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_int8_linear(ada: str, mode: str) -> None:
    for m, k, n in ((1, 5000, 40), (16, 2000, 40), (70, 200, 150)):
        inputs = linear_inputs(LinearCase(m, k, n, ""), torch.bfloat16, mode)
        int8.check(int8.run(inputs), inputs)
    for form in (int8.TILE_64, int8.TILE_128, *(() if mode == "weight_only" else (int8.TILE_256,))):
        inputs = linear_inputs(LinearCase(130, 336, 66, ""), torch.bfloat16, mode)
        int8.check(int8.forced(inputs, form), inputs)


@pytest.mark.parametrize("mode", ["int8", "weight_only"])
@pytest.mark.parametrize("form", [INT4_FORMS[i] for i in (0, 2, 4, 9)], ids=str)
def test_int4_linear(ada: str, form: Any, mode: str) -> None:
    for m, k, n in ((1, 3000, 40), (16, 1000, 40), (30, 300, 40), (130, 300, 70)):
        inputs = int4.made(ada, LinearCase(m, k, n, "99 KB"), form, int4.dtype_of(mode, m), mode)
        int4.check(int4.run(inputs), inputs)


@pytest.mark.parametrize("types", [sparse.BF16, sparse.INT8], ids=str)
@pytest.mark.parametrize("form", sparse.TILES)
def test_block_sparse_linear(ada: str, form: int, types: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse.planned(monkeypatch, form, 2)
    inputs = sparse.made(ada, (20, 300, 200, 0.6), (64, 64), *types, kind="normal")
    sparse.check(sparse.run(inputs), inputs)


def test_distill_loss(ada: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "solve", solve_on(ada))
    with testing.use("cuda"):
        for rows, vocab, options in ((3, 1000, {}), (4, 30000, {}), (3, 2000, {"divergence": "js"})):
            inputs = cpu.made(DistillCase(rows, vocab, "99 KB"), torch.bfloat16)
            cpu.check(inputs, options)
