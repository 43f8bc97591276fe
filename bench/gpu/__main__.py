"""``python -m bench.gpu --out DIR``: everything that is measured on a GPU, in less than ten minutes.

    python -m bench.gpu --out DIR [--only linear losses sparse] [--short] [--budget SECONDS] [--autotune]
    python -m bench.gpu --out DIR --quick --device cpu      a smoke run in Triton's interpreter

Writes ``gpu-<name>.json``, the tables as ``….md`` and plots as ``…-linear.svg`` and the like into DIR. Ends
with status 1 if a side of lissom failed or was wrong; a peer that cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import machine, report

__all__ = ["Plan", "main", "plan", "run"]

BUDGET_SECONDS = {False: 420.0, True: 60.0}
"""Of a full run and of a quick one: rounds end then. What each point does besides (compiling, checking) and
the least rounds come on top once the time is over."""

LIMIT_SECONDS = 540.0
"""After which no point begins: what was measured is written, the rest is listed as left out."""

PARTS = ("linear", "losses", "sparse")
"""In the order in which they are measured."""


@dataclass(frozen=True)
class Plan:
    """What is measured: the grids, each None where it is left out, and bounds on the rounds of a point."""

    linear: Any
    sparse: Any
    losses: Any
    rounds: tuple[int, int]

    @property
    def points(self) -> int:
        """How many points share the time."""
        count = 0
        if self.linear:
            count += self.linear.points
        if self.sparse:
            count += len(self.sparse.shapes) * len(self.sparse.rows) * len(self.sparse.blocks)
        if self.losses:
            count += len(self.losses.logits) + len(self.losses.linear)
        return count


def plan(device: str, quick: bool, only: Sequence[str] = PARTS, short: bool = False) -> Plan:
    """The grids of a run; with ``short`` 12 points of block-sparse layers in place of 72."""
    from . import linear, losses, sparse
    from .timing import ROUNDS

    name = "FULL" if not quick else "QUICK_CPU" if device == "cpu" else "QUICK_GPU"
    grids = {
        part: getattr(module, name) if part in only else None
        for part, module in zip(PARTS, (linear, losses, sparse), strict=True)
    }
    if short and not quick and grids["sparse"]:
        grids["sparse"] = sparse.SHORT
    return Plan(**grids, rounds=(2, 2) if device == "cpu" else (3, 8) if quick else ROUNDS)


def describe(device: torch.device) -> dict[str, Any]:
    """``machine.describe()``, with the GPU and the versions that matter to it."""
    about = machine.describe()
    versions = {name: machine._version(name) for name in ("triton", "liger-kernel")}
    about["versions"] |= {name: version for name, version in versions.items() if version}
    prefixes = ("TRITON_", "CUDA_", "TORCHINDUCTOR_", "PYTORCH_", "NVIDIA_TF32")
    about["environment"] |= {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}
    if device.type != "cuda":
        return {**about, "gpu": {"name": f"no GPU, {about['cpu']}", "cuda": "none", "driver": "none"}}
    properties = torch.cuda.get_device_properties(device)
    return {
        **about,
        "gpu": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            **_smi(device),
        },
    }


def _smi(device: torch.device) -> dict[str, str]:
    """Driver, clocks and power limit as ``nvidia-smi`` has them; the driver is empty where it is missing."""
    fields = {
        "driver": "driver_version",
        "sm_clock": "clocks.max.sm",
        "memory_clock": "clocks.max.mem",
        "power_limit": "power.limit",
        "temperature": "temperature.gpu",
    }
    found = dict.fromkeys(fields, "")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return found
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [] if uuid is None else [f"--id=GPU-{uuid}"]
    command = [tool, *which, f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return found
    values = done.stdout.strip().splitlines()[0].split(", ") if done.stdout.strip() else []
    return {**found, **dict(zip(fields, values, strict=False))}


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(
    wanted: Plan,
    device: torch.device,
    out: Path,
    *,
    budget: float,
    limit: float = LIMIT_SECONDS,
    quick: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Measure, print, write; the result and the path of its JSON."""
    from . import draw, figures, linear, losses, sparse
    from .floors import UNITS, make_probes
    from .timing import Deadline, Faults

    began = time.perf_counter()
    about, faults = describe(device), Faults()
    print(f"{about['gpu']['name']}, {about['commit'][:10]}{' (dirty)' * about['dirty']}", flush=True)
    probes = make_probes(device, faults)
    floors = {
        name: {**_spread([probe() for _ in range(5)]), "unit": UNITS[name]} for name, probe in probes.items()
    }
    deadline = Deadline(budget, wanted.points)
    data: dict[str, Any] = {"linear": [], "sparse": [], "losses": [], "linear_losses": []}

    def tell(point: dict[str, Any]) -> None:
        seconds = time.perf_counter() - began
        ours = {name: side for name, side in point["sides"].items() if name.startswith("lissom")}
        best = ", ".join(
            f"{name} {report.si_time(side['seconds']['median'])}" for name, side in [*ours.items()][:3]
        )
        print(f"{seconds:5.0f} s  {figures.place(point)}: {point['rounds']} rounds; {best}", flush=True)

    left_out: list[str] = []

    def too_late(what: str) -> bool:
        if time.perf_counter() - began < limit:
            return False
        left_out.append(what)
        return True

    if wanted.linear:
        chosen = {name: probes[name] for name in ("read", "bf16", "int8") if name in probes}
        for k, n in wanted.linear.shapes:
            if too_late(f"linear {k}x{n}"):
                continue
            layer = linear.Layer(k, n, device, faults)
            for m in wanted.linear.rows_of(k, n):
                if too_late(f"linear {k}x{n} M={m}"):
                    continue
                compiled = (k, n, m) in wanted.linear.compiled
                point = linear.measure(
                    layer, m, faults, chosen, deadline.next(), compiled=compiled, rounds=wanted.rounds
                )
                data["linear"].append(point)
                tell(point)
            del layer
            _free(device)
    if wanted.losses:
        for shape in wanted.losses.logits:
            if too_late(f"losses {shape}"):
                continue
            point = losses.measure_logits(*shape, device, faults, probes, deadline.next(), wanted.rounds)
            data["losses"].append(point)
            tell(point)
            _free(device)
        for sizes in wanted.losses.linear:
            if too_late(f"linear losses {sizes}"):
                continue
            point = losses.measure_linear(*sizes, device, faults, probes, deadline.next(), wanted.rounds)
            data["linear_losses"].append(point)
            tell(point)
            _free(device)
    if wanted.sparse:
        for k, n in wanted.sparse.shapes:
            for block in wanted.sparse.blocks:
                if too_late(f"sparse {k}x{n} blocks {block}"):
                    continue
                sparse_layer = sparse.Layer(k, n, block, wanted.sparse.sparsities, device, faults)
                for m in wanted.sparse.rows:
                    if too_late(f"sparse {k}x{n} blocks {block} M={m}"):
                        continue
                    point = sparse.measure(sparse_layer, m, faults, {}, deadline.next(), wanted.rounds)
                    data["sparse"].append(point)
                    tell(point)
                del sparse_layer
                _free(device)

    data = {
        "bench": "gpu",
        "quick": quick,
        "timing": device.type,
        "machine": about,
        "budget": {"seconds": budget, "rounds": wanted.rounds},
        "floors": floors,
        **data,
        "faults": faults.ours,
        "peers_left_out": faults.peers,
        "points_left_out": left_out,
        "wall_seconds": time.perf_counter() - began,
    }
    data["figures"] = figures.figures(data)
    report.print_figures(data["figures"])
    stem = out / f"gpu-{slug(about['gpu']['name'])}{'-quick' if quick else ''}"
    path = report.save(stem.with_suffix(".json"), data)
    page = stem.with_suffix(".md")
    page.write_text(figures.markdown(data))
    written = [path, page]
    try:
        written += draw.draw(data, stem)
    except ImportError as error:
        print(f"no plots: {error} (pip install 'lissom[bench]')")
    for file in written:
        print(f"wrote {file}")
    return data, path


def _spread(values: list[float]) -> dict[str, float]:
    from bench.runner import spread

    return spread(values)


def _free(device: torch.device) -> None:
    """Give what graphs and copies held back to the GPU, so that the next point starts with all of it."""
    if device.type == "cuda":
        import gc

        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu-bench"),
        help="folder for JSON, tables and plots (default %(default)s)",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="when rounds end (default 420)")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        default=LIMIT_SECONDS,
        help=f"when no more points begin (default {LIMIT_SECONDS:.0f})",
    )
    parser.add_argument("--short", action="store_true", help="12 points of block-sparse layers, not 72")
    parser.add_argument("--quick", action="store_true", help="a few points; the file ends in -quick")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …; cpu with --quick: a smoke run")
    parser.add_argument("--autotune", action="store_true", help="let lissom's kernels time their tiles first")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        if not options.quick:
            parser.error("--device cpu is a smoke run in Triton's interpreter; give --quick too")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        os.environ["LISSOM_BACKEND"] = "triton"
    os.environ["LISSOM_AUTOTUNE"] = "1" if options.autotune else "0"

    from lissom import _triton

    if device.type == "cuda":
        if reason := _triton.unavailable_reason():
            print(f"nothing to measure: {reason}", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    budget = options.budget or BUDGET_SECONDS[options.quick]
    data, _ = run(
        plan(device.type, options.quick, options.only, options.short),
        device,
        options.out,
        budget=budget,
        limit=options.limit,
        quick=options.quick,
    )
    for what in data["points_left_out"]:
        print(f"left out, the time was over: {what}", file=sys.stderr)
    for name, reason in data["faults"].items():
        print(f"FAULT: {name}: {reason}", file=sys.stderr)
    return 1 if data["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
