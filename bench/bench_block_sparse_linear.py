"""Block-sparse linear against the best dense layer, torch's sparse layouts and the machine's floors.

    python bench/bench_block_sparse_linear.py [--quick | --full] [--shapes 1024x4096 …] [--m 32 128 …]
        [--threads 1 2] [--sparsity 0.5 0.9 …] [--blocks 8x1 …] [--budget SECONDS] [--isa avx2] [--out DIR]
    pytest bench/bench_block_sparse_linear.py --benchmark-only

Blocks are chosen at random over the layer, exactly as many as the sparsity says, so that rows are unevenly
filled. *Best dense* is the faster of torch and ONNX Runtime in float32 at each point. Without options every
shape, M and sparsity is measured with the most threads, and a part of them with fewer; ``--full`` measures
everything.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import floors, linear_grid, machine, report
from bench.linear_grid import COMPUTE_ROWS, ROWS, SHAPES, THREADS, available, make_inputs, make_layer
from bench.peers import Peer, Prepared, Unfit, block_sparse_forms, block_sparse_peers, dense_peers
from bench.peers._base import exact_linear
from bench.peers.lissom_sparse import LissomSparse, held_bytes
from bench.runner import Budget, Rounds, Side, check, geometric_mean, paired, settle, spread, sqnr_db
from lissom import sparse_curve
from lissom.compress.sparsity import FAST_BLOCK_SHAPES
from lissom.sparse_curve import SPARSITIES, parse_block

BENCH = "block_sparse_linear"

SMALL = "lissom fp32 8x1"
"""The blocks that keep accuracy."""
DENSE_INT8 = "lissom int8"
DENSE = ("torch fp32", "ONNX Runtime fp32")

INT8_BLOCKS = ((8, 1), (8, 4), (16, 4))

QUICK: dict[str, Any] = {
    "shapes": linear_grid.QUICK_SHAPES,
    "rows": linear_grid.QUICK_ROWS,
    "sparsities": (0.5, 0.9),
    "blocks": ((8, 1), (16, 1), (16, 16)),
}
"""What is measured of the grid in a smoke run."""

FEWER_ROWS, FEWER_SPARSITIES = (1, 32, 128), (0.5, 0.9)
"""What is measured with fewer than the most threads, unless everything is asked for."""

BACKWARD_ROWS, BACKWARD_SPARSITY = 512, 0.9

MIN_SQNR_DB = {"fp32": 80.0, "bf16": 40.0, "int8": 25.0}
"""By precision, against float64 arithmetic on a side's own weights; lissom below stops the run."""

TARGETS: dict[str, report.Target] = {
    "best_m32_s30_worst": ("×", ">=", 1.0, "30 %, M ≥ 32: best blocks against best dense, worst"),
    "best_m32_s30_geomean": ("×", ">=", None, "30 %, M ≥ 32: geometric mean of the same"),
    "best_m32_s50_worst": ("×", ">=", 1.5, "50 %, M ≥ 32: best blocks against best dense, worst"),
    "best_m32_s50_geomean": ("×", ">=", None, "50 %, M ≥ 32: geometric mean of the same"),
    "best_m32_s80_worst": ("×", ">=", 3.0, "80 %, M ≥ 32: best blocks against best dense, worst"),
    "best_m32_s80_geomean": ("×", ">=", None, "80 %, M ≥ 32: geometric mean of the same"),
    "best_m32_s90_worst": ("×", ">=", 6.0, "90 %, M ≥ 32: best blocks against best dense, worst"),
    "best_m32_s90_geomean": ("×", ">=", None, "90 %, M ≥ 32: geometric mean of the same"),
    "gflops_1024x4096_m128_s90": (
        "GFLOP/s",
        ">=",
        1000.0,
        "1024×4096, M = 128, 90 %: dense-equivalent rate (DeepSparse 408)",
    ),
    "gflops_1024x4096_m32_s90": (
        "GFLOP/s",
        ">=",
        1000.0,
        "1024×4096, M = 32, 90 %: dense-equivalent rate (DeepSparse 28)",
    ),
    "few_rows_share_worst": ("%", ">=", 0.7, "M = 1 and 8: speed-up over best dense × density, worst"),
    "few_rows_share_geomean": ("%", ">=", None, "M = 1 and 8: geometric mean of the same"),
    "small_blocks_share_worst": ("%", ">=", 0.7, "8×1: its speed, of the best blocks', worst"),
    "small_blocks_share_geomean": ("%", ">=", None, "8×1: geometric mean of the same"),
    "int8_m32_s80_worst": ("×", ">=", 7.0, "int8, 80 %, M ≥ 32: best blocks against best dense fp32, worst"),
    "int8_m32_s80_geomean": ("×", ">=", None, "int8, 80 %, M ≥ 32: geometric mean of the same"),
    "int8_vs_dense_int8_worst": (
        "×",
        ">=",
        1.0,
        "int8, from 50 % on: best blocks against our dense int8, worst",
    ),
    "int8_vs_dense_int8_geomean": ("×", ">=", None, "int8, from 50 % on: geometric mean of the same"),
    "int8_vs_dense_int8_m32_worst": ("×", ">=", None, "int8, from 50 % on: worst at M ≥ 32"),
    "backward_m512_s90_worst": (
        "×",
        ">=",
        4.0,
        "both gradients, 90 %, M = 512: best blocks against torch, worst",
    ),
    "backward_m512_s90_geomean": ("×", ">=", None, "both gradients: geometric mean of the same"),
    "backward_8x1_m512_s90_worst": (
        "×",
        ">=",
        None,
        "both gradients, 90 %, M = 512: 8×1 against torch, worst",
    ),
    "bytes_8x1_worst": ("×", "<=", 1.15, "fp32 8×1: bytes held over density × dense bytes, most"),
    "bytes_worst": ("×", "<=", 1.15, "fp32, all blocks of 8 values or more: the same, most"),
    "share_of_fp32_floor_m128_worst": (
        "%",
        ">=",
        None,
        "fp32 best blocks, M ≥ 128: share of the floor, least",
    ),
    "share_of_int8_floor_m128_worst": (
        "%",
        ">=",
        None,
        "int8 best blocks, M ≥ 128: share of the floor, least",
    ),
}
"""Figures to reach (issue 4); those without a bound are stated only. Of several thread counts the worst."""

Point = dict[str, Any]
"""A grid point as :func:`measure_point` returns it."""


@dataclass(frozen=True)
class Case:
    """One grid point to measure; in the order of ``cases`` what is expensive to prepare is kept."""

    k: int
    n: int
    sparsity: float
    threads: int
    m: int


def cases(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    threads: Sequence[int],
    sparsities: Sequence[float],
    *,
    full: bool,
) -> list[Case]:
    """The grid; with ``full=False`` fewer M and sparsities at fewer than the most threads."""
    found = []
    for k, n in shapes:
        for sparsity in sparsities:
            for t in threads:
                if not full and t < max(threads) and sparsity not in FEWER_SPARSITIES:
                    continue
                few = not full and t < max(threads)
                found += [Case(k, n, sparsity, t, m) for m in rows if not few or m in FEWER_ROWS]
    return found


class Sides:
    """Prepared sides of the grid, kept while they can be used again.

    The dense ones belong to a shape and a thread count, the sparse ones to a shape and a sparsity. So do the
    right results that they are checked against: those of the most rows, of which a point takes the first.
    """

    def __init__(
        self, blocks: Sequence[tuple[int, int]], int8_blocks: Sequence[tuple[int, int]], most_rows: int
    ) -> None:
        self.blocks, self.int8_blocks, self.most_rows = tuple(blocks), tuple(int8_blocks), most_rows
        self.left_out: dict[str, str] = {}
        self._dense: dict[int, dict[Peer, Prepared]] = {}
        self._sparse: dict[Peer, Prepared] = {}
        self._shape: tuple[int, int] | None = None
        self._sparsity: float | None = None

    def of(self, case: Case) -> dict[Peer, Prepared]:
        """All sides of one point, dense ones first."""
        if self._shape != (case.k, case.n):
            self._dense, self._sparse, self._sparsity = {}, {}, None
            self._shape = (case.k, case.n)
            generator = torch.Generator().manual_seed(case.k)
            self._x = torch.randn(self.most_rows, case.k, generator=generator)
            weight, bias = make_layer(case.k, case.n)
            self._dense_result = exact_linear(lambda: weight, bias)(self._x)
        if case.threads not in self._dense:
            self._dense[case.threads] = self._prepare(dense_peers(), case)
        if self._sparsity != case.sparsity:
            self._sparse = {}
            sparse = [
                *block_sparse_forms(case.sparsity, self.blocks, self.int8_blocks),
                *block_sparse_peers(case.sparsity),
            ]
            self._sparse, self._sparsity = self._prepare(sparse, case), case.sparsity
        return self._dense[case.threads] | self._sparse

    def x(self, case: Case) -> Tensor:
        """The input ``[m, k]`` that the sides of :meth:`of` are checked with."""
        return self._x[: case.m]

    def _prepare(self, peers: Iterable[Peer], case: Case) -> dict[Peer, Prepared]:
        fitting, reasons = available(peers)
        found: dict[Peer, Prepared] = {}
        weight, bias = make_layer(case.k, case.n)
        for peer in fitting:
            try:
                call = peer.prepare(weight, bias, case.m, case.threads)
            except Unfit as error:
                reasons[f"{peer.name} at {case.k}x{case.n}"] = str(error)
                continue
            right = call.exact(self._x) if call.exact else self._dense_result
            found[peer] = replace(call, exact=lambda x, right=right: right[: len(x)])
        for name, reason in reasons.items():
            if name not in self.left_out:
                print(f"left out: {name}: {reason}")
        self.left_out |= reasons
        return found


def floor_probes(case: Case, isa: str) -> dict[str, floors.Probe]:
    """The arithmetic floors that hold from M = 32 on: of float32, and of int8 in lissom's instruction set."""
    if case.m < COMPUTE_ROWS or floors.unavailable_reason() or isa == "scalar":
        return {}
    kinds = {"avx2": "fp32_avx2"}.get(isa, floors.fp32_kind()), floors.compute_kind(isa)
    return {kind: floors.probe(kind, case.threads) for kind in kinds if kind}


def measure_point(case: Case, prepared: dict[Peer, Prepared], x: Tensor, isa: str, budget: Budget) -> Point:
    """Check with ``x`` ``[m, k]``, time, figures."""
    sides = [Side(peer.name, call) for peer, call in prepared.items()]
    sqnr: dict[str, float] = {}
    for precision, bar in MIN_SQNR_DB.items():
        group = [Side(peer.name, call) for peer, call in prepared.items() if peer.precision == precision]
        ours = [side.name for side in group if side.name.startswith("lissom")]
        sqnr |= check(group, x, x.new_empty(case.m, case.n), must_pass=ours, bar=bar)
    rounds = paired(
        sides,
        lambda g: make_inputs(case.m, case.k, g),
        probes=floor_probes(case, isa),
        budget=budget,
        seed=case.m + 7 * case.threads,
    )
    best_dense = min((name for name in DENSE if name in rounds.seconds), key=rounds.median)

    def best(precision: str) -> str | None:
        names = [p.name for p in prepared if isinstance(p, LissomSparse) and p.precision == precision]
        return min(names, key=rounds.median, default=None)

    return {
        **vars(case),
        "rounds": len(rounds.seconds[best_dense]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "floors": {kind: spread(rates) for kind, rates in rounds.rates.items()},
        "best_dense": best_dense,
        "best_fp32": best("fp32"),
        "best_int8": best("int8"),
        "sides": {
            peer.name: _summarise(case, peer, call, rounds, best_dense, sqnr[peer.name])
            for peer, call in prepared.items()
        },
    }


def _summarise(
    case: Case, peer: Peer, call: Prepared, rounds: Rounds, best_dense: str, sqnr: float
) -> dict[str, Any]:
    """Medians, rates, paired ratios and the share of the floor of one side, ready for JSON."""
    seconds = rounds.seconds[peer.name]
    operations = 2 * case.m * case.k * case.n
    entry: dict[str, Any] = {
        "precision": peer.precision,
        "seconds": spread(seconds) | {"best": min(seconds)},
        "dense_gflops": operations / rounds.median(peer.name) / 1e9,
        "weight_bytes": call.weight_bytes,
        "sqnr_db": sqnr,
        "suspect": not sqnr >= MIN_SQNR_DB[peer.precision],
        "calls_per_chunk": rounds.calls_per_chunk[peer.name],
        "speedup_over_best_dense": spread(rounds.ratio(best_dense, peer.name)),
    }
    if isinstance(peer, LissomSparse):
        layer = peer.layer(*make_layer(case.k, case.n))
        stored = layer.density * operations
        entry |= {
            "block_shape": list(peer.block_shape),
            "density": layer.density,
            "bytes_over_density": call.weight_bytes / (layer.density * 4 * case.k * case.n),
        }
        if DENSE_INT8 in rounds.seconds and peer.precision == "int8":
            entry["speedup_over_dense_int8"] = spread(rounds.ratio(DENSE_INT8, peer.name))
        kind = next((k for k in rounds.rates if k.startswith(peer.precision)), None)
        if kind:
            shares = [stored / s / 1e9 / r for s, r in zip(seconds, rounds.rates[kind], strict=True)]
            entry["share_of_floor"] = spread(shares)
    return entry


def print_point(point: Point) -> None:
    """The table of one grid point."""
    rows = []
    for name, side in point["sides"].items():
        seconds, over, share = side["seconds"], side["speedup_over_best_dense"], side.get("share_of_floor")
        mark = " *" if name in (point["best_dense"], point["best_fp32"], point["best_int8"]) else ""
        rows.append(
            [
                name + mark + (" (!)" if side["suspect"] else ""),
                report.si_time(seconds["median"]),
                f"{report.si_time(seconds['p25'])} – {report.si_time(seconds['p75'])}",
                f"{side['dense_gflops']:.0f}",
                f"{over['median']:.2f} ({over['p25']:.2f}–{over['p75']:.2f})",
                f"{100 * share['median']:.0f} %" if share else "",
                f"{side['bytes_over_density']:.3f}" if "bytes_over_density" in side else "",
                f"{side['sqnr_db']:.1f}",
            ]
        )
    where = f"K={point['k']} N={point['n']} M={point['m']}, {100 * point['sparsity']:g} % sparse, "
    where += f"{point['threads']} thread(s), {point['rounds']} rounds"
    for kind, rate in point["floors"].items():
        where += f"; floor {kind} {rate['median']:.0f} GOP/s"
    report.print_table(
        where,
        [
            "side (* best)",
            "median",
            "25–75 %",
            "dense GFLOP/s",
            "speed-up",
            "of floor",
            "bytes/(d·dense)",
            "SQNR dB",
        ],
        rows,
    )
    if point["noise"]:
        print(point["noise"])


def _gradients(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Both gradients in one vector."""
    return torch.cat([t.flatten().float() for t in pair])


def measure_backward(
    k: int,
    n: int,
    threads: int,
    blocks: Sequence[tuple[int, int]],
    budget: Budget,
    *,
    m: int = BACKWARD_ROWS,
    sparsity: float = BACKWARD_SPARSITY,
) -> dict[str, Any]:
    """The gradients of input and stored values in one turn, against torch's two dense products."""
    from lissom.ops import block_sparse_grad_input, block_sparse_grad_values

    weight, bias = make_layer(k, n)
    layers = {form.name: form.layer(weight, bias) for form in (LissomSparse(b, sparsity) for b in blocks)}

    def inputs(g: torch.Generator) -> list[Any]:
        return [(torch.randn(m, k, generator=g), torch.randn(m, n, generator=g))]

    def dense(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, grad = pair
        return grad @ weight, grad.t() @ x

    def sparse(layer: Any) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        values, crow, col = layer.values.detach(), layer.crow_indices, layer.col_indices
        height, width = layer.block_shape

        def run(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, grad = pair
            return (
                block_sparse_grad_input(grad, values, crow, col, n, k, validated=True),
                block_sparse_grad_values(grad, x, crow, col, height, width, validated=True),
            )

        return run

    sides = [Side(DENSE[0], Prepared(dense, weight.nbytes))]
    sides += [Side(name, Prepared(sparse(layer), held_bytes(layer))) for name, layer in layers.items()]
    (pair,) = inputs(torch.Generator().manual_seed(0))
    found = {DENSE[0]: sqnr_db(_dense_gradients(pair, weight, None), _gradients(dense(pair)))}
    for name, layer in layers.items():
        with torch.inference_mode():
            own = _gradients(sparse(layer)(pair))
        found[name] = sqnr_db(_dense_gradients(pair, layer.to_dense().detach(), layer), own)
        if not found[name] >= MIN_SQNR_DB["fp32"]:
            raise AssertionError(
                f"{name}: gradients at K={k}, N={n}, M={m}: SQNR {found[name]:.1f} dB is below "
                f"{MIN_SQNR_DB['fp32']:g} dB; not timed"
            )
    rounds = paired(sides, inputs, budget=budget, seed=threads)
    best = min(layers, key=rounds.median)
    return {
        "k": k,
        "n": n,
        "m": m,
        "threads": threads,
        "sparsity": sparsity,
        "rounds": len(rounds.seconds[best]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "best": best,
        "sides": {
            side.name: {
                "seconds": spread(rounds.seconds[side.name]),
                "dense_gflops": 4 * m * k * n / rounds.median(side.name) / 1e9,
                "speedup_over_torch": spread(rounds.ratio(DENSE[0], side.name)),
                "sqnr_db": found[side.name],
            }
            for side in sides
        },
    }


def _dense_gradients(pair: tuple[Tensor, Tensor], weight: Tensor, layer: Any) -> Tensor:
    """Both gradients in float64 arithmetic, in the layout of ``layer``'s values (None: dense)."""
    x, grad = pair[0].double(), pair[1].double()
    to_weight = (grad.t() @ x).float()
    if layer is None:
        return _gradients(((grad @ weight.double()).float(), to_weight))
    height, width = layer.block_shape
    rows, columns = len(layer.crow_indices) - 1, -(-weight.shape[1] // width)
    padded = torch.nn.functional.pad(
        to_weight, (0, columns * width - weight.shape[1], 0, rows * height - weight.shape[0])
    )
    blocks = padded.view(rows, height, columns, width).transpose(1, 2)
    block_row = torch.repeat_interleave(torch.arange(rows), layer.crow_indices.diff())
    at_stored = blocks[block_row, layer.col_indices.long()]
    return _gradients(((grad @ weight.double()).float(), at_stored))


def print_backward(points: Sequence[dict[str, Any]]) -> None:
    """Both gradients, one row per point and side."""
    report.print_table(
        f"Both gradients, {100 * BACKWARD_SPARSITY:g} % sparse",
        ["side", "K×N", "M", "threads", "median", "dense GFLOP/s", "speed-up over torch"],
        [
            [
                name + (" *" if name == p["best"] else ""),
                f"{p['k']}×{p['n']}",
                str(p["m"]),
                str(p["threads"]),
                report.si_time(side["seconds"]["median"]),
                f"{side['dense_gflops']:.0f}",
                "{median:.2f} ({p25:.2f}–{p75:.2f})".format(**side["speedup_over_torch"]),
            ]
            for p in points
            for name, side in p["sides"].items()
        ],
    )


def where(point: dict[str, Any]) -> str:
    """A grid point in a few words."""
    threads = f"{point['threads']} thread{'s' if point['threads'] > 1 else ''}"
    return f"{point['k']}×{point['n']} M={point['m']}, {100 * point['sparsity']:g} %, {threads}"


def figures(points: Sequence[Point], backward: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The issue's figures from the measured points; each with its bound and whether it was met.

    Medians of paired ratios; ``at`` says where the worst was. *Best blocks* are chosen at each point, as is
    the best dense layer.
    """
    values: dict[str, float | None] = {}
    places: dict[str, str] = {}

    def put(stem: str, pairs: Iterable[tuple[float, Point]], *, least: bool = True) -> None:
        found = list(pairs)
        if found:
            worst = (min if least else max)(found, key=lambda pair: pair[0])
            values[f"{stem}_worst"], places[f"{stem}_worst"] = worst[0], where(worst[1])
            values[f"{stem}_geomean"] = geometric_mean([value for value, _ in found])

    def of(at: Iterable[Point], which: str, key: str) -> Iterator[tuple[float, Point]]:
        """``key``'s median of the side that the point names ``which``, or of that side itself."""
        for p in at:
            side = p["sides"].get(p.get(which, which))
            if side and key in side:
                yield side[key]["median"], p

    many = [p for p in points if p["m"] >= COMPUTE_ROWS]
    for sparsity in (0.3, 0.5, 0.8, 0.9):
        at = [p for p in many if p["sparsity"] == sparsity]
        put(f"best_m32_s{100 * sparsity:.0f}", of(at, "best_fp32", "speedup_over_best_dense"))
    threads = max((p["threads"] for p in points), default=0)
    for m in (32, 128):
        values[f"gflops_1024x4096_m{m}_s90"] = min(
            (
                p["sides"][p["best_fp32"]]["dense_gflops"]
                for p in points
                if (p["k"], p["n"], p["m"], p["sparsity"], p["threads"]) == (1024, 4096, m, 0.9, threads)
            ),
            default=None,
        )
    few = of([p for p in points if p["m"] in (1, 8)], "best_fp32", "speedup_over_best_dense")
    put("few_rows_share", ((speedup * (1 - p["sparsity"]), p) for speedup, p in few))
    put(
        "small_blocks_share",
        (
            (p["sides"][p["best_fp32"]]["seconds"]["median"] / p["sides"][SMALL]["seconds"]["median"], p)
            for p in points
            if SMALL in p["sides"]
        ),
    )
    put(
        "int8_m32_s80",
        of([p for p in many if p["sparsity"] == 0.8], "best_int8", "speedup_over_best_dense"),
    )
    half = [p for p in points if p["sparsity"] >= 0.5]
    put("int8_vs_dense_int8", of(half, "best_int8", "speedup_over_dense_int8"))
    many_half = [p for p in half if p["m"] >= COMPUTE_ROWS]
    put("int8_vs_dense_int8_m32", of(many_half, "best_int8", "speedup_over_dense_int8"))
    put("backward_m512_s90", of(backward, "best", "speedup_over_torch"))
    put("backward_8x1_m512_s90", of(backward, SMALL, "speedup_over_torch"))
    held = [
        (side["bytes_over_density"], p, name)
        for p in points
        for name, side in p["sides"].items()
        if side["precision"] == "fp32" and math.prod(side.get("block_shape", ())) >= 8
    ]
    put("bytes_8x1", ((value, p) for value, p, name in held if name == SMALL), least=False)
    put("bytes", ((value, p) for value, p, _ in held), least=False)
    much = [p for p in points if p["m"] >= 128]
    put("share_of_fp32_floor_m128", of(much, "best_fp32", "share_of_floor"))
    put("share_of_int8_floor_m128", of(much, "best_int8", "share_of_floor"))
    found = report.judge(TARGETS, values)
    return {name: figure | {"at": places.get(name, "")} for name, figure in found.items()}


def crossovers(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Sparsity from which on each of lissom's sparse sides beats the best dense layer, with the most threads.

    ``always``: at the least sparsity measured, so the crossover lies there or below.
    """
    threads = max((p["threads"] for p in points), default=0)
    curves: dict[tuple[int, int, int, str], list[tuple[float, float]]] = {}
    for p in points:
        for name, side in p["sides"].items():
            if p["threads"] == threads and "block_shape" in side:
                speedup = side["speedup_over_best_dense"]["median"]
                curves.setdefault((p["k"], p["n"], p["m"], name), []).append((p["sparsity"], speedup))
    return [
        {
            "k": k,
            "n": n,
            "m": m,
            "threads": threads,
            "side": name,
            "crossover": sparse_curve.crossover(curve),
            "always": sparse_curve.always(curve),
        }
        for (k, n, m, name), curve in curves.items()
    ]


def print_crossovers(found: Sequence[dict[str, Any]]) -> None:
    """One row per shape and M, one column per side."""
    names = list(dict.fromkeys(c["side"] for c in found))
    cells = {(c["k"], c["n"], c["m"], c["side"]): c for c in found}
    report.print_table(
        "Faster than the best dense layer from this sparsity on (–: nowhere)",
        ["K×N, M", *(name.removeprefix("lissom ") for name in names)],
        [
            [f"{k}×{n}, {m}", *(_percent(cells.get((k, n, m, name))) for name in names)]
            for k, n, m in dict.fromkeys((c["k"], c["n"], c["m"]) for c in found)
        ],
    )


def _percent(crossing: dict[str, Any] | None) -> str:
    if crossing is None:
        return ""
    at = crossing["crossover"]
    return "–" if at is None else f"{'≤ ' if crossing['always'] else ''}{100 * at:.0f} %"


def run(
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    threads: Sequence[int] = THREADS,
    sparsities: Sequence[float] = SPARSITIES,
    blocks: Sequence[tuple[int, int]] = FAST_BLOCK_SHAPES,
    int8_blocks: Sequence[tuple[int, int]] = INT8_BLOCKS,
    budget: Budget | None = None,
    out: Path = report.RESULTS,
    quick: bool = False,
    full: bool = False,
    backward: bool = True,
) -> Path:
    """The grid; prints tables, writes the JSON and returns its path."""
    budget = budget or grid_budget(None, quick)
    about = machine.describe()
    isa = about["isa"]
    print(report.headline(about))
    if isa == "reference":
        print("WARNING: lissom._C is missing; these are times of the slow reference backend, not the kernels")
    grid = cases(shapes, rows, threads, sparsities, full=full)
    gradients = [(t, k, n) for t in threads for k, n in shapes] if backward else []
    sides = Sides(blocks, int8_blocks, max(rows))
    before = torch.get_num_threads()
    points: list[Point] = []
    backward_points: list[dict[str, Any]] = []
    began = time.perf_counter()
    try:
        settle()
        for case in grid:
            torch.set_num_threads(case.threads)
            points.append(measure_point(case, sides.of(case), sides.x(case), isa, budget))
            print_point(points[-1])
            done, spent = len(points), time.perf_counter() - began
            print(
                f"[{done}/{len(grid)}] {spent:.0f} s, about {spent / done * (len(grid) - done):.0f} s left\n"
            )
        for t, k, n in gradients:
            torch.set_num_threads(t)
            backward_points.append(measure_backward(k, n, t, blocks, budget))
        if backward_points:
            print_backward(backward_points)
    finally:
        torch.set_num_threads(before)
    crossing = crossovers(points)
    print_crossovers(crossing)
    found = figures(points, backward_points)
    report.print_noise([*points, *backward_points])
    report.print_figures(found)
    data = {
        "bench": BENCH,
        "quick": quick,
        "full": full,
        "machine": about,
        "budget": vars(budget),
        "left_out": sides.left_out,
        "points": points,
        "backward": backward_points,
        "crossovers": crossing,
        "figures": found,
        "wall_seconds": time.perf_counter() - began,
    }
    path = report.save(report.result_path(out, BENCH, about, quick=quick), data)
    print(f"wrote {path}")
    return path


def grid_budget(seconds: float | None, quick: bool) -> Budget:
    """Of one grid point: ``seconds`` (default 2, quick 0.7) and at least 3 rounds."""
    return Budget(seconds or (0.7 if quick else 2.0), 3)


def sparsity_argument(text: str) -> float:
    """A number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a sparsity; from 0 to below 1, such as 0.9")
    return value


def block_argument(text: str) -> tuple[int, int]:
    try:
        return parse_block(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few points, 0.7 s each")
    size.add_argument("--full", action="store_true", help="every point at every thread count (half an hour)")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument(
        "--shapes", type=linear_grid.parse_shape, nargs="+", metavar="KxN", help="in_features x out_features"
    )
    parser.add_argument("--m", "--rows", type=int, nargs="+", metavar="M", help="rows of x")
    parser.add_argument("--sparsity", type=sparsity_argument, nargs="+", metavar="S")
    parser.add_argument("--blocks", type=block_argument, nargs="+", metavar="HxW", help="outputs x inputs")
    parser.add_argument("--int8-blocks", type=block_argument, nargs="*", metavar="HxW")
    parser.add_argument(
        "--isa", help="instruction set for lissom (scalar, avx2, avx512vnni); peers are not limited"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="wall-clock time per grid point (default 2)"
    )
    parser.add_argument("--no-backward", action="store_true", help="leave out the gradients")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for JSON and plots")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args(arguments)
    linear_grid.force_isa(options.isa)
    asked = {
        "shapes": options.shapes,
        "rows": options.m,
        "sparsities": options.sparsity,
        "blocks": options.blocks,
        "int8_blocks": options.int8_blocks,
    }
    quick = options.quick
    grid = (QUICK if quick else {}) | {key: value for key, value in asked.items() if value is not None}
    path = run(
        threads=options.threads,
        **grid,
        budget=grid_budget(options.budget, quick),
        out=options.out,
        quick=quick,
        full=options.full,
        backward=not options.no_backward,
    )
    if not options.no_plot:
        from bench import plot

        plot.draw(path)


@linear_grid.each_point(
    [*dense_peers(), *block_sparse_forms(0.9, FAST_BLOCK_SHAPES, INT8_BLOCKS), *block_sparse_peers(0.9)]
)
def test_block_sparse_linear(
    benchmark: Any, threads: int, shape: tuple[int, int], m: int, peer: Peer
) -> None:
    """pytest-benchmark: one side at one grid point, at 90 % sparsity."""
    linear_grid.benchmark_side(BENCH, benchmark, threads, shape, m, peer)


if __name__ == "__main__":
    main()
