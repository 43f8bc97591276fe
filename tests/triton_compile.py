"""Compiles Triton kernels for GPUs that are not here: ``python tests/triton_compile.py OP …``, JSON lines.

Of what an op's ``compilations()`` lists, everything for sm_90, and for the other architectures every kernel
and tile once, whatever its dtypes and options; with ``--all`` everything for all.

A program of its own: Triton decides at import whether its functions are compiled or interpreted.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
THOROUGH = 90
WGMMA, MMA, TCGEN05 = "wgmma", "mma.sync", "tcgen05.mma"


def ops() -> list[str]:
    """Every kernel file that has configurations to compile."""
    return sorted(
        p.stem for p in KERNELS.glob("*.py") if "def compilations(" in p.read_text() and p.stem != "tiles"
    )


def compile_one(one: Any, architecture: int) -> dict[str, Any]:
    names = one.kernel.arg_names
    constants = {**one.constants, **one.tile.sizes}
    signature = {name: "constexpr" if name in constants else one.types[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in one.aligned}
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {
        "num_warps": one.tile.num_warps,
        "num_stages": one.tile.num_stages,
        "maxnreg": one.tile.maxnreg,
        "enable_fp_fusion": one.fp_fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    dots = re.findall(r"tt\.dot .*-> tensor<(\d+)x(\d+)x", compiled.asm["ttir"])
    return {
        "name": one.name,
        "tile": str(one.tile),
        "architecture": architecture,
        "warps": one.tile.num_warps,
        "dot": [min((int(sizes[i]) for sizes in dots), default=0) for i in (0, 1)],
        "roomy": one.roomy,
        "shared": compiled.metadata.shared,
        "tf32": ".tf32" in ptx or "::tf32" in ptx,
        "tensor_cores": [name for name in (WGMMA, MMA, TCGEN05) if name in ptx],
        "wants_tensor_cores": one.tensor_cores,
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory (where spills go) of a kernel, from its machine code."""
    import subprocess
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {text}")
    return {"registers": int(found[1]), "local_bytes": int(found[2])}


def compilations(op: str) -> list[Any]:
    return list(importlib.import_module(f"lissom.kernels.{op}").compilations())


def compile_job(job: tuple[str, int, int]) -> dict[str, Any]:
    op, number, architecture = job
    return {"op": op, **compile_one(compilations(op)[number], architecture)}


def jobs(op: str, everything: bool) -> list[tuple[str, int, int]]:
    """Op, place in its list, architecture."""
    found, seen = [], set()
    for number, one in enumerate(compilations(op)):
        for architecture in one.architectures:
            key = one.kernel.__name__, str(one.tile), architecture
            if everything or architecture == THOROUGH or key not in seen:
                found.append((op, number, architecture))
            seen.add(key)
    return found


def main(arguments: list[str]) -> None:
    chosen = [name for name in arguments if name != "--all"] or ops()
    every = [job for op in chosen for job in jobs(op, "--all" in arguments)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(compile_job, every, chunksize=4):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
