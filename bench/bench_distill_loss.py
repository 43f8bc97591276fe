"""Distillation losses, forward + backward, against torch's composition in eager mode and compiled.

    python bench/bench_distill_loss.py [--quick] [--shapes 512x32000 …] [--threads 1 2] [--isa avx2]
        [--budget SECONDS] [--no-compile] [--no-linear] [--out DIR]
    pytest bench/bench_distill_loss.py --benchmark-only

*KL*: temperature 2, forward KL. *CE + KL*: with labels besides. *linear*: the loss from hidden states, and
how much memory it takes at its peak, against the logits' form. Every side starts from logits (hidden states)
that require grad and ends with their gradient.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import floors, linear_grid, machine, report
from bench.linear_grid import THREADS
from bench.peers import Prepared
from bench.runner import Budget, Side, paired, settle, spread, sqnr_db
from lissom.reference.distill_loss import DistillOptions, row_losses
from lissom.reference.linear_distill_loss import linear_distill_loss as linear_page

BENCH = "distill_loss"

SHAPES = ((512, 32000), (128, 128256), (4096, 10), (2048, 1000))
"""(rows, vocabulary)."""
QUICK_SHAPES = ((4096, 10), (512, 1000))
LINEAR = (2048, 512, 32000)
"""Tokens, hidden size, vocabulary."""
QUICK_LINEAR = (256, 64, 4000)

TEMPERATURE = 2.0
TERMS: dict[str, dict[str, float]] = {"KL": {"ce_weight": 0.0}, "CE + KL": {"ce_weight": 1.0}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MIN_SQNR_DB = {"fp32": 90.0, "bf16": 35.0}
"""lissom's gradient below this, against float64, stops the run. One rounding to bfloat16 gives 50 dB; in the
linear form logits and sums over chunks are rounded as well."""

CHECK_ELEMENTS = 1 << 21
"""What is computed in float64 at once."""

TARGETS: dict[str, report.Target] = {
    "eager_512x32000": ("×", ">=", 10.0, "512×32000 fp32: against eager"),
    "compile_512x32000": ("×", ">=", 5.0, "512×32000 fp32: against torch.compile"),
    "eager_128x128256": ("×", ">=", 10.0, "128×128256 fp32: against eager"),
    "compile_128x128256": ("×", ">=", 5.0, "128×128256 fp32: against torch.compile"),
    "eager_4096x10": ("×", ">=", 3.0, "4096×10 fp32: against eager"),
    "compile_4096x10": ("×", ">=", None, "4096×10 fp32: against torch.compile"),
    "eager_2048x1000": ("×", ">=", 3.0, "2048×1000 fp32: against eager"),
    "compile_2048x1000": ("×", ">=", None, "2048×1000 fp32: against torch.compile"),
    "bf16_over_fp32": ("×", "<=", 1.0, "bf16's time over fp32's, the worst shape"),
    "extra_bytes_per_row": ("bytes", "<=", 128.0, "memory beyond the gradient, per row, the worst shape"),
    "linear_memory": ("%", "<=", 0.10, "linear fp32: peak memory beyond the gradients, of the logits' form"),
    "linear_eager": ("×", ">=", 1.0, "linear fp32: against the logits' form in eager mode"),
    "linear_compile": ("×", ">=", None, "linear fp32: against the logits' form, compiled"),
}
"""The issue's figures, with the most threads measured."""

Pair = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def lissom_loss(terms: dict[str, float]) -> Loss:
    from lissom.ops import distill_loss

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        given = labels if terms["ce_weight"] else None
        return distill_loss(student, teacher, given, temperature=TEMPERATURE, **terms)

    return loss


def composition(terms: dict[str, float]) -> Loss:
    """As torch's documentation has it."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(student / TEMPERATURE, -1)
        log_q = F.log_softmax(teacher / TEMPERATURE, -1)
        value = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return value + F.cross_entropy(student, labels) if terms["ce_weight"] else value

    return loss


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def differentiable(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``step`` where the runner's inference mode does not reach."""

    def run(feed: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return step(feed)

    return run


def make_inputs(rows: int, vocab: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits of student and teacher, a few per row large, and labels; several where they are small."""
    count = max(1, min(4, (1 << 18) // (rows * vocab)))
    with torch.inference_mode(False):
        made = []
        for _ in range(count):
            pair = torch.randn(2, rows, vocab, generator=generator)
            peaks = torch.randint(vocab, (2, rows, 3), generator=generator)
            pair.scatter_add_(-1, peaks, torch.full(peaks.shape, 8.0))
            made.append((pair[0], pair[1], torch.randint(vocab, (rows,), generator=generator)))
    return made


def make_sides(terms: dict[str, float], compile_too: bool) -> list[Side]:
    """In each dtype: lissom, eager, and compiled; names end in the dtype."""
    forms: dict[str, Loss] = {"lissom": lissom_loss(terms), "torch eager": composition(terms)}
    if compile_too:
        forms["torch.compile"] = compiled(composition(terms))
    return [
        Side(f"{name} {short}", Prepared(_step(loss), 0, feed=_feed(dtype)))
        for (name, loss), (short, dtype) in itertools.product(forms.items(), DTYPES.items())
    ]


def _feed(dtype: torch.dtype) -> Callable[[Any], Any]:
    def feed(made: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, labels = made
        with torch.inference_mode(False):
            return student.to(dtype), teacher.to(dtype), labels

    return feed


def _step(loss: Loss) -> Callable[[Any], Any]:
    def step(made: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        student, teacher, labels = made
        leaf = student.detach().requires_grad_()
        value = loss(leaf, teacher, labels)
        value.backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    return differentiable(step)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most that torch's allocator held at once for ``function``, above what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def check_logits(side: Side, made: tuple[Tensor, Tensor, Tensor], terms: dict[str, float]) -> float:
    """SQNR in dB of the side's gradient against float64 on the logits as it sees them.

    Raises:
        AssertionError: lissom below ``MIN_SQNR_DB``, or its loss off by more than the gradient may be.
    """
    student, teacher, labels = side.call.feed(made)
    loss, grad = side.call.run((student, teacher, labels))
    rows, vocab = student.shape
    options = DistillOptions(temperature=TEMPERATURE, **terms)
    exact = torch.empty(rows, vocab)
    total = 0.0
    for part in torch.arange(rows).split(max(1, CHECK_ELEMENTS // vocab)):
        losses, slopes = row_losses(
            student[part], teacher[part], labels[part], options, term_scale=1 / rows, ce_scale=1 / rows
        )
        exact[part] = slopes.float()
        total += float(losses.sum())
    return _judged(side, sqnr_db(exact, grad), abs(float(loss) - total) / abs(total))


def _judged(side: Side, found: float, loss_error: float) -> float:
    bar = MIN_SQNR_DB[side.name.rsplit(" ", 1)[1]]
    if side.name.startswith("lissom") and not (found >= bar and loss_error <= 10 ** (-bar / 20)):
        raise AssertionError(
            f"{side.name}: SQNR of the gradient {found:.1f} dB (bar {bar:g}), relative error of the loss "
            f"{loss_error:.1e}; not timed"
        )
    return found


def measure_logits(
    rows: int, vocab: int, threads: int, what: str, budget: Budget, *, compile_too: bool = True
) -> dict[str, Any]:
    """One point from logits: check, memory, time, figures."""
    terms = TERMS[what]
    sides = make_sides(terms, compile_too)
    made = make_inputs(rows, vocab, torch.Generator().manual_seed(rows))[0]
    sqnr = {side.name: check_logits(side, made, terms) for side in sides}
    extra = {}
    for side in sides:
        fed = side.call.feed(made)
        extra[side.name] = peak_bytes(lambda s=side, f=fed: s.call.run(f)) - fed[0].nbytes  # type: ignore[misc]
    moved = 3 * made[0].nbytes  # student and teacher read, gradient written, once each, in float32
    kind = "" if floors.unavailable_reason() else floors.bandwidth_kind(moved, threads)
    probe = floors.probe(kind, threads, moved) if kind else None
    rounds = paired(
        sides,
        lambda g: make_inputs(rows, vocab, g),
        probes={kind: probe} if probe else {},
        budget=budget,
        seed=rows + threads,
    )
    point = _point(sides, rounds, sqnr, extra) | {
        "rows": rows,
        "vocab": vocab,
        "threads": threads,
        "terms": what,
        "floor": None,
    }
    if probe:
        point["floor"] = {"kind": kind, "bytes": moved, "rate": spread(rounds.rates[kind]), "unit": "GB/s"}
        shares = [
            moved / (rate * 1e9) / seconds
            for rate, seconds in zip(rounds.rates[kind], rounds.seconds["lissom fp32"], strict=True)
        ]
        point["sides"]["lissom fp32"]["share_of_floor"] = spread(shares)
    return point


def _point(
    sides: Sequence[Side], rounds: Any, sqnr: dict[str, float], extra: dict[str, int]
) -> dict[str, Any]:
    """What every point has; ``time_over_lissom`` is within a dtype."""
    found = {}
    for side in sides:
        short = side.name.rsplit(" ", 1)[1]
        found[side.name] = {
            "dtype": short,
            "seconds": spread(rounds.seconds[side.name]),
            "time_over_lissom": spread(rounds.ratio(side.name, f"lissom {short}")),
            "sqnr_db": sqnr[side.name],
            "extra_bytes": extra[side.name],
        }
    ratio = spread(rounds.ratio("lissom bf16", "lissom fp32")) if "lissom bf16" in found else None
    return {
        "rounds": len(rounds.seconds["lissom fp32"]),
        "foreign_cores": rounds.foreign_cores,
        "noise": rounds.noise(),
        "bf16_over_fp32": ratio,
        "sides": found,
    }


# ------------------------------------------------------------------------------------------- linear


def make_hidden(tokens: int, size: int, generator: torch.Generator) -> Pair:
    """Hidden states of student and teacher."""
    with torch.inference_mode(False):
        pair = torch.randn(2, tokens, size, generator=generator)
    return pair[0], pair[1]


def linear_sides(size: int, vocab: int, compile_too: bool) -> tuple[list[Side], dict[str, Pair]]:
    """The sides, and by dtype the output layers of student and teacher."""
    from lissom.ops import distill_loss, linear_distill_loss

    generator = torch.Generator().manual_seed(vocab)
    heads = torch.randn(2, vocab, size, generator=generator) * 2 / size**0.5
    loss = composition(TERMS["KL"])

    def chunked(h: Tensor, w: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return linear_distill_loss(h, w, teacher_hidden=g, teacher_weight=v, temperature=TEMPERATURE)

    def logits_form(h: Tensor, w: Tensor, g: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            others = F.linear(g, v)
        return loss(F.linear(h, w), others, others)

    def fused_loss(h: Tensor, w: Tensor, g: Tensor, v: Tensor) -> Tensor:
        return distill_loss(F.linear(h, w), F.linear(g, v.detach()), temperature=TEMPERATURE)

    forms: dict[str, Callable[..., Tensor]] = {
        "lissom": chunked,
        "lissom distill_loss of logits": fused_loss,
        "torch eager": logits_form,
    }
    if compile_too:
        forms["torch.compile"] = compiled(logits_form)
    layers = {short: (heads[0].to(dtype), heads[1].to(dtype)) for short, dtype in DTYPES.items()}

    def step(form: Callable[..., Tensor], short: str) -> Callable[[Any], Any]:
        def run(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
            hidden, weight = pair[0].detach().requires_grad_(), layers[short][0].detach().requires_grad_()
            value = form(hidden, weight, pair[1], layers[short][1])
            value.backward()
            assert hidden.grad is not None
            assert weight.grad is not None
            return value.detach(), hidden.grad, weight.grad

        return differentiable(run)

    def feed(dtype: torch.dtype) -> Callable[[Any], Any]:
        def convert(pair: Pair) -> Pair:
            with torch.inference_mode(False):
                return pair[0].to(dtype), pair[1].to(dtype)

        return convert

    sides = [
        Side(f"{name} {short}", Prepared(step(form, short), 0, feed=feed(dtype)))
        for (name, form), (short, dtype) in itertools.product(forms.items(), DTYPES.items())
    ]
    return sides, layers


def linear_expected(pair: Pair, heads: Pair) -> tuple[float, Tensor, Tensor]:
    """Loss and both gradients in float64, some rows at a time."""
    tokens, vocab = pair[0].shape[0], heads[0].shape[0]
    total, hidden = 0.0, torch.empty(pair[0].shape)
    weight = torch.zeros(heads[0].shape, dtype=torch.float64)
    for part in torch.arange(tokens).split(max(1, CHECK_ELEMENTS // vocab)):
        losses, gradients = linear_page(
            (pair[0][part], heads[0], None),
            (pair[1][part], heads[1], None),
            None,
            DistillOptions(temperature=TEMPERATURE),
            term_scale=1 / tokens,
        )
        total += float(losses.sum())
        hidden[part] = gradients.hidden.float()
        weight += gradients.weight
    return total, hidden, weight.float()


def measure_linear(
    tokens: int, size: int, vocab: int, threads: int, budget: Budget, *, compile_too: bool = True
) -> dict[str, Any]:
    """The point from hidden states: check, memory, time, figures."""
    sides, layers = linear_sides(size, vocab, compile_too)
    made = make_hidden(tokens, size, torch.Generator().manual_seed(tokens))
    sqnr, extra = {}, {}
    expected: dict[str, tuple[float, Tensor, Tensor]] = {}
    for side in sides:
        fed, short = side.call.feed(made), side.name.rsplit(" ", 1)[1]
        if short not in expected:
            expected[short] = linear_expected(fed, layers[short])
        loss, *gradients = side.call.run(fed)
        total, *exact = expected[short]
        worst = min(sqnr_db(e, g) for e, g in zip(exact, gradients, strict=True))
        sqnr[side.name] = _judged(side, worst, abs(float(loss) - total) / abs(total))
        held = sum(g.nbytes for g in gradients)
        del loss, gradients
        extra[side.name] = peak_bytes(lambda s=side, f=fed: s.call.run(f)) - held  # type: ignore[misc]
    rounds = paired(sides, lambda g: [make_hidden(tokens, size, g)], budget=budget, seed=tokens + threads)
    return _point(sides, rounds, sqnr, extra) | {
        "tokens": tokens,
        "hidden": size,
        "vocab": vocab,
        "threads": threads,
    }


# ------------------------------------------------------------------------------------------- report


def figures(points: Sequence[dict[str, Any]], linear: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The issue's figures, from the points with the most threads; ``at`` says where the worst was."""
    threads = max((p["threads"] for p in [*points, *linear]), default=0)
    values: dict[str, float | None] = {}
    places: dict[str, str] = {}

    def over(point: dict[str, Any], side: str) -> float | None:
        found = point["sides"].get(side)
        return found["time_over_lissom"]["median"] if found else None

    kl = [p for p in points if p["threads"] == threads and p["terms"] == "KL"]
    for p in kl:
        where = f"{p['rows']}x{p['vocab']}"
        values[f"eager_{where}"] = over(p, "torch eager fp32")
        values[f"compile_{where}"] = over(p, "torch.compile fp32")
    if kl:
        slowest = max(kl, key=lambda p: p["bf16_over_fp32"]["median"])
        values["bf16_over_fp32"] = slowest["bf16_over_fp32"]["median"]
        places["bf16_over_fp32"] = f"{slowest['rows']}×{slowest['vocab']}"
        held = [
            (p["sides"][name]["extra_bytes"] / p["rows"], p)
            for p in kl
            for name in ("lissom fp32", "lissom bf16")
        ]
        worst = max(held, key=lambda pair: pair[0])
        values["extra_bytes_per_row"] = worst[0]
        places["extra_bytes_per_row"] = f"{worst[1]['rows']}×{worst[1]['vocab']}"
    for p in linear:
        if p["threads"] == threads:
            eager, own = (p["sides"][f"{name} fp32"]["extra_bytes"] for name in ("torch eager", "lissom"))
            values["linear_memory"] = own / eager if eager else None
            values["linear_eager"] = over(p, "torch eager fp32")
            values["linear_compile"] = over(p, "torch.compile fp32")
    found = report.judge(TARGETS, {name: values.get(name) for name in TARGETS})
    return {name: figure | {"at": places.get(name, "")} for name, figure in found.items()}


def print_points(
    title: str, points: Sequence[dict[str, Any]], label: Callable[[dict[str, Any]], str]
) -> None:
    """One row per point and side."""
    rows = []
    for p in points:
        for name, side in p["sides"].items():
            share = side.get("share_of_floor")
            rows.append(
                [
                    name,
                    label(p),
                    str(p["threads"]),
                    report.si_time(side["seconds"]["median"]),
                    "{median:.2f} ({p25:.2f}–{p75:.2f})".format(**side["time_over_lissom"]),
                    f"{side['sqnr_db']:.1f}",
                    f"{side['extra_bytes'] / 2**20:.3g}",
                    f"{100 * share['median']:.0f} %" if share else "",
                ]
            )
    columns = ["side", "point", "threads", "median", "time / lissom's", "SQNR dB", "extra MiB", "of floor"]
    report.print_table(title, columns, rows)


def run(
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    linear: tuple[int, int, int] | None = LINEAR,
    threads: Sequence[int] = THREADS,
    budget: Budget | None = None,
    out: Path = report.RESULTS,
    quick: bool = False,
    compile_too: bool = True,
) -> Path:
    """The grid; prints tables, writes the JSON and returns its path."""
    budget = budget or point_budget(None, quick)
    about = machine.describe()
    print(report.headline(about))
    if about["isa"] == "reference":
        print("WARNING: lissom._C is missing; these are times of the slow reference backend, not the kernels")
    before, began = torch.get_num_threads(), time.perf_counter()
    points: list[dict[str, Any]] = []
    linear_points: list[dict[str, Any]] = []
    try:
        settle()
        for t in threads:
            torch.set_num_threads(t)
            for rows, vocab in shapes:
                for what in TERMS:
                    if what == "KL" or t == max(threads):
                        p = measure_logits(rows, vocab, t, what, budget, compile_too=compile_too)
                        points.append(p)
                        print_points(f"{what}, {rows}×{vocab}", [p], lambda p: p["terms"])
            if linear and t == max(threads):
                linear_points.append(measure_linear(*linear, t, budget, compile_too=compile_too))
                print_points(
                    "from hidden states", linear_points, lambda p: f"{p['tokens']}×{p['hidden']}×{p['vocab']}"
                )
    finally:
        torch.set_num_threads(before)
    found = figures(points, linear_points)
    report.print_noise([*points, *linear_points])
    report.print_figures(found)
    data = {
        "bench": BENCH,
        "quick": quick,
        "machine": about,
        "budget": vars(budget),
        "temperature": TEMPERATURE,
        "points": points,
        "linear": linear_points,
        "figures": found,
        "wall_seconds": time.perf_counter() - began,
    }
    path = report.save(report.result_path(out, BENCH, about, quick=quick), data)
    print(f"wrote {path}")
    return path


def point_budget(seconds: float | None, quick: bool) -> Budget:
    """Of one point: ``seconds`` (default 6, quick 0.7) and at least 5 rounds, 3 if quick."""
    return Budget(seconds or (0.7 if quick else 6.0), 3 if quick else 5)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--shapes", type=linear_grid.parse_shape, nargs="+", metavar="RxV", help="rows x vocabulary"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--isa", help="instruction set for lissom; peers are not limited")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="per point (default 6)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-linear", action="store_true", help="leave out the form from hidden states")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    linear_grid.force_isa(options.isa)
    run(
        shapes=options.shapes or (QUICK_SHAPES if options.quick else SHAPES),
        linear=None if options.no_linear else QUICK_LINEAR if options.quick else LINEAR,
        threads=options.threads,
        budget=point_budget(options.budget, options.quick),
        out=options.out,
        quick=options.quick,
        compile_too=not options.no_compile,
    )


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("side", range(4), ids=["lissom-fp32", "lissom-bf16", "eager-fp32", "eager-bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_distill_loss(benchmark: Any, shape: tuple[int, int], side: int) -> None:
    """pytest-benchmark: one side at one shape, with torch's current thread count."""
    benchmark.group = f"distill_loss {shape[0]}x{shape[1]}"
    call = make_sides(TERMS["KL"], False)[side].call
    fed = call.feed(make_inputs(*shape, torch.Generator().manual_seed(0))[0])
    _, grad = benchmark(call.run, fed)
    assert grad.shape == shape


if __name__ == "__main__":
    main()
