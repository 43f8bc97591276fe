"""csrc/cuda compiles for GPUs that are not here: no spills, and the instructions that each op is about.

``-Xptxas -v`` tells of spills; cuobjdump, which comes with triton, disassembles.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
ARCHITECTURES = {80: "80", 90: "90a"}

MMA = ["HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "IMMA.16832.S8.S8", "LDSM.16.M88.4"]
OVERLAP = ["ACQBULK", "PREEXIT"]
"""Waiting for the kernel before, and letting the next one begin."""
INT4 = [*MMA, "LDGSTS.E.BYPASS.128", "LDS.128", "LDG.E.NA.128", "LDG.E.NA.64"]
WGMMA = ["HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x16.F32 ", "IGMMA.64x128x32.S8.S8"]
INSTRUCTIONS = {
    "block_sparse_linear": {
        80: [*MMA, "LDGSTS.E.BYPASS.128"],
        90: [
            *MMA,
            *("HGMMA.64x128x16.F32.BF16", "HGMMA.64x64x16.F32.BF16"),
            *("HGMMA.64x128x16.F32 ", "HGMMA.64x64x16.F32 "),
            *("IGMMA.64x128x32.S8.S8", "IGMMA.64x64x32.S8.S8"),
            *("UTMALDG.2D.MULTICAST", "USETMAXREG"),
        ],
    },
    "distill_loss": {
        80: ["LDG.E.EF.128", "STG.E.EF.128", "HMNMX2.BF16_V2", "MUFU.EX2", "F2FP.BF16.PACK_AB"],
        90: ["LDG.E.EF.128", "STG.E.EF.128", "HMNMX2.BF16_V2", "MUFU.EX2", "UBLKCP", "UCGABAR_ARV"],
    },
    "int4_linear": {80: INT4, 90: [*INT4, *WGMMA, *OVERLAP, "UBLKCP", "UBLKPF", "USETMAXREG"]},
    "int8_embedding": {80: ["STG.E.128"], 90: ["STG.E.128"]},
    "int8_linear": {
        80: [
            "IMMA.16832.S8.S8",
            "HMMA.16816.F32.BF16",
            "HMMA.16816.F32 ",
            "LDGSTS.E.BYPASS.128",
            "LDG.E.NA.128",
        ],
        90: [
            *("IGMMA.64x256x32.S8.S8", "UTMALDG.2D.MULTICAST", "USETMAXREG", "IMMA.16832", "LDG.E.NA.128"),
            *(*OVERLAP, "UBLKPF"),
        ],
    },
    "quantize_rows": {80: ["LDG.E.128", "STG.E.128"], 90: ["LDG.E.128", "STG.E.128", *OVERLAP]},
}
"""Of each op, what must be among its SASS: IMMA and HMMA on sm_80, IGMMA and HGMMA (wgmma) on sm_90a, …"""


def nvcc(*args: str) -> str:
    """Compile; the compiler's messages."""
    program = shutil.which("nvcc")
    if not program:
        pytest.skip("nvcc is not installed")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES.values()]
    command = [program, "-std=c++17", "-O3", "--threads=2", *targets, '-DLISSOM_CUDA_ARCHITECTURES=""', *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def check_resources(messages: str) -> None:
    """No kernel spills, none uses local memory, and the compiler ignored nothing."""
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        messages,
        re.DOTALL,
    )
    assert kernels
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
    command = [cuobjdump, "-sass", "-arch", f"sm_{ARCHITECTURES[architecture]}", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles(source: Path, tmp_path: Path) -> None:
    binary = tmp_path / "kernels.o"
    messages = nvcc("-Xptxas=-v", "-Xcompiler=-Wall,-Wextra", "-c", str(source), "-o", str(binary))
    check_resources(messages)
    for architecture, expected in INSTRUCTIONS.get(source.stem, {}).items():
        code = sass(binary, architecture)
        for instruction in expected:
            assert instruction in code, f"sm_{architecture}: no {instruction}"


def test_every_op_names_its_instructions() -> None:
    assert set(INSTRUCTIONS) == {path.stem for path in SOURCES} - {"launch"}


def test_every_helper_compiles(tmp_path: Path) -> None:
    """What the emulator's own tests use, with every instruction of hopper.cuh."""
    source, binary = tmp_path / "helpers.cu", tmp_path / "helpers.o"
    source.write_text('#include "selftest_kernel.cuh"\n')
    include = (f"-I{CUDA}", f"-I{ROOT / 'tests' / 'cuda_emulator'}")
    nvcc(*include, "-c", str(source), "-o", str(binary))
    for architecture in ARCHITECTURES:
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
