"""Instruction sets: which runs, that all give the same bits, and what a forced one that cannot run says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lissom import _native, testing
from lissom.reference import int8_linear as page
from lissom.testing import (
    ACT_FNS,
    ALL_ISAS,
    DTYPES,
    LINEAR_CASES,
    MODES,
    LinearCase,
    assert_same_bits,
    force_isa,
    linear_inputs,
)

pytestmark = pytest.mark.usefixtures("needs_native")

OP = torch.ops.lissom.int8_linear.default
BUNDLES = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
}


@pytest.fixture(autouse=True)
def _native_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISSOM_BACKEND", "native")


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


def test_isas_are_those_of_the_cpu() -> None:
    """Against the kernel's own list, which also knows whether the system saves the registers."""
    flags = cpu_flags()
    if not flags:
        pytest.skip("/proc/cpuinfo lists no flags")
    expected = {isa: BUNDLES[isa] <= flags for isa in ALL_ISAS}
    assert {isa: _native.isas()[isa] for isa in ALL_ISAS} == expected
    assert list(_native.isas()) == list(reversed(ALL_ISAS)), "best first"


def test_automatic_choice_is_the_best() -> None:
    module = _native.load()
    before = module.active_isa()
    try:
        module.select_isa("")
        assert module.active_isa() == testing.isas()[-1]
    finally:
        module.select_isa(before)


def test_force_isa_restores_what_was_there() -> None:
    before = _native.isa()
    for isa in testing.isas():
        with force_isa(isa):
            assert _native.isa() == isa
            assert {r["detail"] for r in testing.registry.backend_info() if r["backend"] == "native"} == {isa}
        assert _native.isa() == before
    with pytest.raises(KeyError), force_isa("scalar"):
        raise KeyError
    assert _native.isa() == before


def grid() -> Iterator[tuple[LinearCase, torch.dtype, str, str | None]]:
    options = itertools.cycle(
        itertools.product(MODES, DTYPES, ACT_FNS)
    )  # 45 and 27 cases: all pairs, in turn
    for _ in range(5):
        for case in LINEAR_CASES:
            mode, dtype, act_fn = next(options)
            if case.m < 1000 or (mode == "weight_only" and act_fn is None):
                yield case, dtype, mode, act_fn


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_all_isas_give_the_bits_of_the_contract(isa: str) -> None:
    """Quantized: the reference's bits. Weight-only: the scalar kernel's, which sums over k in order."""
    if reason := testing.why_not(f"native-{isa}"):
        pytest.skip(f"{isa}: {reason}")
    for case, dtype, mode, act_fn in grid():
        inputs = linear_inputs(case, dtype, mode, act_fn)
        with force_isa(isa):
            y = OP(*inputs.args)
        with force_isa("scalar"):
            scalar = OP(*inputs.args)
        where = f"{case} {dtype} {mode} {act_fn}"
        try:
            assert_same_bits(y, scalar)
            if mode != "weight_only":
                assert_same_bits(y, page.int8_linear(*inputs.args))
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error


def test_weight_only_sums_over_k_in_order_with_fma(native: str) -> None:
    """One chain of fused multiply-adds per output: the definition itself, step by step."""
    from lissom.reference.numerics import fma

    inputs = linear_inputs(LinearCase(14, 130, 35, ""), torch.float32, "weight_only", kind="normal")
    assert inputs.bias is not None
    total = torch.zeros(14, 35)
    for k in range(130):
        a, b = inputs.x[:, k : k + 1].expand(14, 35), inputs.qweight[:, k].float().expand(14, 35)
        total = fma(a, b, total)
    scale, bias = inputs.weight_scale.expand(14, 35), inputs.bias.expand(14, 35)
    assert_same_bits(OP(*inputs.args), fma(total, scale, bias))


@pytest.mark.parametrize("act_fn", [a for a in ACT_FNS if a])
def test_activation_functions_bit_by_bit(native: str, act_fn: str) -> None:
    """Through the whole kernel, over the range of float32: the value comes in as the bias."""
    from lissom.reference.numerics import apply_activation

    values = torch.cat(
        [
            torch.linspace(-20, 20, 20_001),
            torch.logspace(-44, 38, 5_000),
            -torch.logspace(-44, 38, 5_000),
            torch.tensor(
                [0.0, -0.0, 87.0, -87.0, 88.0, -88.0, 88.5, -88.5, float("inf"), -float("inf"), float("nan")]
            ),
        ]
    )
    n = len(values)
    y = OP(
        torch.zeros(1, 1), torch.zeros(n, 1, dtype=torch.int8), torch.zeros(n), values, None, False, act_fn
    )
    # fma(0, 0, v) is v, and +0 for -0.
    assert_same_bits(y[0], apply_activation(values + 0.0, act_fn))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_comes_in_and_goes_out_right(native: str, dtype: torch.dtype) -> None:
    """All 65536 patterns: widened by the kernels on the way in, and rounded from float32 on the way out."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1)
    one, scale = torch.tensor([[1]], dtype=torch.int8), torch.ones(1)
    for weight_only in (True, False):
        y = OP(every, one, scale, None, None, weight_only)
        if weight_only:
            assert_same_bits(
                y, torch.where(every == 0, torch.zeros_like(every), every)
            )  # fma(±0, 1, +0) = +0
        else:
            assert_same_bits(y, page.int8_linear(every, one, scale))
    # Rounding: values between neighbours, exact ties among them, and beyond the largest.
    generator = torch.Generator().manual_seed(0)
    finite = every[every.isfinite()].float()
    between = torch.cat(
        [
            finite * (1 + torch.finfo(dtype).eps / 2),
            finite * 1.0003,
            torch.randn(5000, generator=generator),
            finite * 2,
        ]
    )
    n = len(between)
    zero = torch.zeros(1, 1, dtype=dtype)
    y = OP(zero, torch.zeros(n, 1, dtype=torch.int8), torch.zeros(n), between)
    assert_same_bits(y[0], (between + 0.0).to(dtype))


SCRIPT = """
import torch, lissom
from lissom import _native, nn
layer = nn.Int8Linear.from_linear(torch.nn.Linear(20, 18))
layer(torch.randn(3, 20))
print(_native.isa(), {row["detail"] for row in lissom.backend_info() if row["backend"] == "native"})
"""


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_environment_forces_the_isa(isa: str, run_python) -> None:  # type: ignore[no-untyped-def]
    result = run_python(SCRIPT, LISSOM_FORCE_ISA=isa, LISSOM_BACKEND="")
    if not testing.why_not(f"native-{isa}"):
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == f"{isa} {{'{isa}'}}"
    else:
        assert result.returncode != 0
        assert (
            f"RuntimeError: LISSOM_FORCE_ISA: instruction set '{isa}' is not available on this CPU"
            in result.stderr
        )
        assert "use one of: " in result.stderr


def test_environment_with_an_unknown_isa(run_python) -> None:  # type: ignore[no-untyped-def]
    result = run_python(SCRIPT, LISSOM_FORCE_ISA="avx9000", LISSOM_BACKEND="")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "RuntimeError: LISSOM_FORCE_ISA: instruction set 'avx9000' is unknown; use one of: "
    )
    assert last.removesuffix("]").split(" [")[0].endswith(", ".join(reversed(testing.isas())))


def test_import_and_info_survive_a_forced_isa_that_cannot_run(run_python) -> None:  # type: ignore[no-untyped-def]
    script = 'import lissom; print([r["detail"] for r in lissom.backend_info() if r["backend"] == "native"])'
    result = run_python(script, LISSOM_FORCE_ISA="avx9000", LISSOM_BACKEND="")
    assert result.returncode == 0, result.stderr
    assert "'avx9000' is unknown" in result.stdout


def test_the_reference_runs_whatever_isa_is_forced(run_python) -> None:  # type: ignore[no-untyped-def]
    script = """
import torch
from lissom import formats, ops
q, s = formats.quantize_int8(torch.ones(2, 3))
print(ops.int8_linear(torch.ones(1, 3), q, s, backend="reference").shape)
"""
    result = run_python(script, LISSOM_FORCE_ISA="avx9000", LISSOM_BACKEND="")
    assert result.returncode == 0, result.stderr


def test_selecting_what_is_unknown_or_lacking_changes_nothing() -> None:
    module = _native.load()
    before = module.active_isa()
    with pytest.raises(
        ValueError, match=r"instruction set 'sse9' is unknown; use one of: (avx512vnni, )?(avx2, )?scalar"
    ):
        module.select_isa("sse9")
    for isa in ALL_ISAS:
        if not _native.isas()[isa]:
            with pytest.raises(
                ValueError, match=rf"instruction set '{isa}' is not available on this CPU; use one of:"
            ):
                module.select_isa(isa)
    assert module.active_isa() == before
