"""csrc/cuda compiles for GPUs that are not here: no spills, and the instructions that each op is about.

``-Xptxas -v`` tells of spills; cuobjdump, which comes with triton, disassembles.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
from cuda_build import ARCHITECTURES, ROOT, SOURCES, CudaBuild, nvcc, run

CUDA = ROOT / "csrc" / "cuda"

MMA = ["HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "IMMA.16832.S8.S8", "LDSM.16.M88.4"]
OVERLAP = ["ACQBULK", "PREEXIT"]
"""Waiting for the kernel before, and letting the next one begin."""
INT4 = [*MMA, "LDGSTS.E.BYPASS.128", "LDS.128", "LDG.E.NA.128", "LDG.E.NA.64"]
INT8 = ["IMMA.16832.S8.S8", *MMA[:2], "LDGSTS.E.BYPASS.128", "LDG.E.NA.128"]
SPARSE = [*MMA, "LDGSTS.E.BYPASS.128"]
LOSS = ["LDG.E.EF.128", "STG.E.EF.128", "HMNMX2.BF16_V2", "MUFU.EX2"]
WGMMA = ["HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x16.F32 ", "IGMMA.64x128x32.S8.S8"]
INSTRUCTIONS = {
    "block_sparse_linear": {
        80: SPARSE,
        90: [
            *MMA,
            *("HGMMA.64x128x16.F32.BF16", "HGMMA.64x64x16.F32.BF16"),
            *("HGMMA.64x128x16.F32 ", "HGMMA.64x64x16.F32 "),
            *("IGMMA.64x128x32.S8.S8", "IGMMA.64x64x32.S8.S8"),
            *("UTMALDG.2D.MULTICAST", "USETMAXREG"),
        ],
        100: SPARSE,
    },
    "distill_loss": {80: [*LOSS, "F2FP.BF16.PACK_AB"], 90: [*LOSS, "UBLKCP", "UCGABAR_ARV"], 100: LOSS},
    "int4_linear": {
        80: INT4,
        90: [*INT4, *WGMMA, *OVERLAP, "UBLKCP", "UBLKPF", "USETMAXREG"],
        100: [*INT4, *OVERLAP, "UBLKPF"],
    },
    "int8_embedding": {80: ["STG.E.128"], 90: ["STG.E.128"], 100: ["STG.E.128"]},
    "int8_linear": {
        80: INT8,
        90: [
            *("IGMMA.64x256x32.S8.S8", "UTMALDG.2D.MULTICAST", "USETMAXREG", "IMMA.16832", "LDG.E.NA.128"),
            *(*OVERLAP, "UBLKPF"),
        ],
        100: [*INT8, *OVERLAP, "UBLKPF"],
    },
    "quantize_rows": {
        80: ["LDG.E.128", "STG.E.128"],
        90: ["LDG.E.128", "STG.E.128", *OVERLAP],
        100: ["LDG.E.128", "STG.E.128", *OVERLAP],
    },
}
"""Of each op, what must be among its SASS: IMMA and HMMA everywhere, IGMMA and HGMMA (wgmma) on sm_90a, …"""


def compile_for(architectures: list[str], *args: str) -> str:
    """The compiler's messages."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = [nvcc(), "-std=c++17", "-O3", "--threads=2", *targets, '-DLISSOM_CUDA_ARCHITECTURES=""', *args]
    return run(command, CUDA)


def check_resources(messages: str, architectures: list[str]) -> None:
    """No kernel spills, none uses local memory, and the compiler ignored nothing, for any of these."""
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        messages,
        re.DOTALL,
    )
    assert {architecture for _, architecture, *_ in kernels} == set(architectures)
    for name, architecture, stack, stores, loads in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), (
            f"{name} for {architecture}: {stack} bytes of stack, {stores} of spill stores, {loads} of loads"
        )
    assert not re.search("warning|Performance Loss", messages, re.IGNORECASE), messages


def sass(binary: Path, architecture: int) -> str:
    try:
        cuobjdump = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
    except (ImportError, AttributeError) as error:
        pytest.skip(f"triton, which brings cuobjdump, could not be imported ({error})")
    name = ARCHITECTURES[architecture].removesuffix("-real")
    command = [cuobjdump, "-sass", "-arch", f"sm_{name}", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("source", [path.stem for path in SOURCES])
def test_compiles(source: str, cuda_build: CudaBuild) -> None:
    binary, messages = cuda_build.compile(source)
    check_resources(messages, ["sm_80", "sm_90a", "sm_100"])
    for architecture, expected in INSTRUCTIONS.get(source, {}).items():
        code = sass(binary, architecture)
        for instruction in expected:
            assert instruction in code, f"sm_{architecture}: no {instruction}"


def test_compiles_for_what_is_between(tmp_path: Path) -> None:
    """sm_86 and sm_89, for which no code is written apart: one op with nearly all the registers there are."""
    source = str(CUDA / "block_sparse_linear.cu")
    messages = compile_for(["86", "89"], "-Xptxas=-v", "-c", source, "-o", str(tmp_path / "kernels.o"))
    check_resources(messages, ["sm_86", "sm_89"])


def test_every_op_names_its_instructions() -> None:
    assert set(INSTRUCTIONS) == {path.stem for path in SOURCES} - {"launch"}


def test_every_helper_compiles(tmp_path: Path) -> None:
    """What the emulator's own tests use, with every instruction of hopper.cuh."""
    source, binary = tmp_path / "helpers.cu", tmp_path / "helpers.o"
    source.write_text('#include "selftest_kernel.cuh"\n')
    include = (f"-I{CUDA}", f"-I{ROOT / 'tests' / 'cuda_emulator'}")
    compile_for(["80", "90a"], *include, "-c", str(source), "-o", str(binary))
    for architecture in (80, 90):
        code = sass(binary, architecture)
        for instruction in (
            "LDSM.16.M88.4",
            "LDSM.16.MT88.2",
            "HMMA.16816.F32.BF16",
            "HMMA.16816.F32 ",
            "IMMA.16832.S8.S8",
        ):
            assert instruction in code, f"sm_{architecture}: no {instruction}"
        assert "LDGSTS.E.BYPASS.128" in code
    for instruction in ("UBLKCP", "UTMALDG", "SYNCS", "UCGABAR", "USETMAXREG"):
        assert instruction in code, f"sm_90a: no {instruction}"
