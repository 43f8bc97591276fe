"""Distillation losses, forward + backward: ``distill_loss`` and ``linear_distill_loss``.

KL at temperature 2, bfloat16. Every side starts from logits (hidden states and output layers) of which the
student's require grad, and ends with their gradients. Sides of the logits' form: ``lissom``; ``lissom cuda``
and ``lissom triton``, by these kernels, where CUDA C++ can run; ``torch eager``, as torch's documentation
composes it, and ``torch.compile`` of that; ``Liger KLDiv``, which wants log-probabilities, made by torch;
``Liger JSD`` with β = 0, which is KL. Of the linear form: ``lissom``;
``torch eager`` and ``torch.compile`` on whole logits; ``Liger`` (fused linear JSD with β = 0).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_distill_loss import TEMPERATURE, TERMS, composition, lissom_loss, peak_bytes
from bench.runner import spread
from lissom.reference.distill_loss import DistillOptions, row_losses
from lissom.reference.linear_distill_loss import linear_distill_loss as linear_page

from .linear import rounds_done
from .timing import CUDA, TRITON, Faults, Side, cuda_missing, first_line, on, paired, synchronize

__all__ = ["EAGER", "OURS", "OURS_CUDA", "OURS_TRITON", "Grid", "measure_linear", "measure_logits"]

OURS, EAGER, COMPILED = "lissom", "torch eager", "torch.compile"
OURS_CUDA, OURS_TRITON = f"{OURS} {CUDA}", f"{OURS} {TRITON}"
KL = TERMS["KL"]

MIN_DB = {"logits": 35.0, "linear": 30.0}
"""SQNR in dB of lissom's gradients against float64: one rounding to bfloat16 gives 50; in the linear form
logits and sums over chunks are rounded as well, as the eager composite's are."""

MAX_LOSS_ERROR = 5e-3
"""Relative, of lissom's loss: in the linear form bfloat16 logits move it."""

CHECK_ELEMENTS = 1 << 24
"""Logits whose float64 copies are held at once."""


@dataclass(frozen=True)
class Grid:
    """(rows, vocabulary) of logits; (tokens, hidden size, vocabulary) of the linear form."""

    logits: Sequence[tuple[int, int]]
    linear: Sequence[tuple[int, int, int]]


FULL = Grid(logits=((8192, 32000), (8192, 128256)), linear=((8192, 4096, 128256),))
QUICK_GPU = Grid(logits=((2048, 32000),), linear=((1024, 1024, 32000),))
QUICK_CPU = Grid(logits=((5, 300),), linear=((6, 32, 200),))

Step = Callable[[], tuple[Tensor, ...]]
"""Runs forward and backward; returns the loss and the gradients."""


# ------------------------------------------------------------------------------------------- peers


def _liger(name: str) -> Any:
    """An attribute of ``liger_kernel.transformers``."""
    return getattr(importlib.import_module("liger_kernel.transformers"), name)


def _liger_kl(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    kl = _liger("LigerKLDIVLoss")(reduction="batchmean", log_target=True)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = (F.log_softmax(z / TEMPERATURE, -1) for z in (student, teacher))
        value: Tensor = kl(log_p, log_q) * TEMPERATURE**2
        return value

    return loss


def _liger_jsd(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    jsd = _liger("LigerJSD")(beta=0.0)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = (F.log_softmax(z / TEMPERATURE, -1) for z in (student, teacher))
        value: Tensor = jsd(log_p, log_q) * TEMPERATURE**2
        return value

    return loss


def _plain(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Of a loss that takes labels, which KL does not read."""
    return lambda student, teacher: loss(student, teacher, teacher)


def _compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # a smoke run has no time for the former
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


_LOGITS: dict[str, Callable[[torch.device], Callable[[Tensor, Tensor], Tensor]]] = {
    OURS: lambda device: _plain(lissom_loss(KL)),
    EAGER: lambda device: _plain(composition(KL)),
    COMPILED: lambda device: _compiled(_plain(composition(KL)), device),
    "Liger KLDiv": _liger_kl,
    "Liger JSD": _liger_jsd,
}


def _lissom_linear(device: torch.device) -> Callable[..., Tensor]:
    from lissom.ops import linear_distill_loss

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return linear_distill_loss(
            hidden, weight, teacher_hidden=teacher, teacher_weight=teacher_weight, temperature=TEMPERATURE
        )

    return loss


def _whole_logits(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    with torch.no_grad():
        others = F.linear(teacher, teacher_weight)
    return composition(KL)(F.linear(hidden, weight), others, others)


def _liger_linear(device: torch.device) -> Callable[..., Tensor]:
    jsd = _liger("LigerFusedLinearJSD")(jsd_beta=0.0, temperature=TEMPERATURE)

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        value: Tensor = jsd(hidden, weight, teacher, teacher_weight, None) * TEMPERATURE**2
        return value

    return loss


_LINEAR: dict[str, Callable[[torch.device], Callable[..., Tensor]]] = {
    OURS: _lissom_linear,
    EAGER: lambda device: _whole_logits,
    COMPILED: lambda device: _compiled(_whole_logits, device),
    "Liger": _liger_linear,
}


# ------------------------------------------------------------------------------------------- points


def _step(loss: Callable[..., Tensor], leaves: Sequence[Tensor], rest: Sequence[Tensor]) -> Step:
    """``leaves`` get gradients; the student's come before the teacher's in pairs of (student, teacher)."""

    def run() -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            own = [leaf.detach().requires_grad_() for leaf in leaves]
            value = loss(*own, *rest)
            return value.detach(), *torch.autograd.grad(value, own)

    return run


def _peak(step: Step, device: torch.device) -> int:
    """Most that was held at once beyond what is there before and the gradients that are there afterwards."""
    gradients = sum(t.nbytes for t in step()[1:])
    if device.type != "cuda":
        return peak_bytes(step) - gradients
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before - gradients
    del kept
    return peak


def _sqnr_db(expected: Tensor, actual: Tensor) -> float:
    """``runner.sqnr_db``, some rows at a time: its float64 copies of all logits take tens of GiB."""
    signal = noise = 0.0
    rows = max(1, CHECK_ELEMENTS // expected.shape[1])
    for e, a in zip(expected.split(rows), actual.split(rows), strict=True):
        signal += float(e.double().square().sum())
        noise += float((e.double() - a.double()).square().sum())
    if not math.isfinite(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _check(
    name: str, bar: float, found: Sequence[Tensor], total: float, exact: Sequence[Tensor]
) -> dict[str, float]:
    """The worst SQNR of the gradients, and the loss's relative error.

    Raises:
        AssertionError: lissom's are not good enough.
    """
    worst = min(_sqnr_db(e, g) for e, g in zip(exact, found[1:], strict=True))
    error = abs(float(found[0]) - total) / abs(total)
    if name in (OURS, OURS_CUDA, OURS_TRITON) and not (worst >= bar and error <= MAX_LOSS_ERROR):
        raise AssertionError(f"wrong: SQNR of a gradient {worst:.1f} dB, error of the loss {error:.1e}")
    return {"sqnr_db": worst, "loss_error": error}


def _measure(
    makers: dict[str, Callable[[torch.device], Callable[..., Tensor]]],
    leaves: Sequence[Tensor],
    rest: Sequence[Tensor],
    expected: tuple[float, Sequence[Tensor]],
    bar: float,
    where: str,
    faults: Faults,
    probes: dict[str, Callable[[], float]],
    until: float,
    rounds: tuple[int, int],
) -> tuple[dict[str, Any], Any]:
    device = leaves[0].device
    sides, about = [], {}
    for name, make in makers.items():
        try:
            step = _step(make(device), leaves, rest)
            about[name] = _check(name, bar, step(), *expected)
            about[name]["extra_bytes"] = _peak(step, device)
        except Exception as error:
            faults.add(name, where, first_line(error))
            continue
        sides.append(Side(name, [step], graph=False, grad=True))
    del expected
    result, _ = paired(sides, device, where, faults, probes=probes, until=until, rounds=rounds)
    entries = {
        name: {
            "seconds": spread(result.seconds[name]),
            "speedup_over": {
                other: spread(result.ratio(other, name)) for other in result.seconds if other != name
            },
            **about[name],
        }
        for name in result.seconds
    }
    return {"rounds": rounds_done(result), "sides": entries}, result


def _logits(rows: int, vocab: int, device: torch.device) -> Tensor:
    """Of student and teacher [2, rows, vocab], a few per row large."""
    generator = torch.Generator(device).manual_seed(rows + vocab)
    pair = torch.randn(2, rows, vocab, generator=generator, device=device)
    peaks = torch.randint(vocab, (2, rows, 3), generator=generator, device=device)
    return pair.scatter_add_(-1, peaks, torch.full(peaks.shape, 8.0, device=device)).bfloat16()


def measure_logits(
    rows: int,
    vocab: int,
    device: torch.device,
    faults: Faults,
    probes: dict[str, Callable[[], float]],
    until: float,
    rounds: tuple[int, int],
) -> dict[str, Any]:
    """One point of ``distill_loss``; the floor is two reads and a write of the logits' size."""
    student, teacher = _logits(rows, vocab, device)
    total, exact = 0.0, torch.empty_like(student, dtype=torch.float32)
    options = DistillOptions(temperature=TEMPERATURE)
    for part in torch.arange(rows, device=device).split(max(1, CHECK_ELEMENTS // vocab)):
        losses, slopes = row_losses(student[part], teacher[part], None, options, term_scale=1 / rows)
        exact[part] = slopes.float()
        total += float(losses.sum())
    floor = {name: probe for name, probe in probes.items() if name == "add"}
    makers = dict(_LOGITS)
    if reason := cuda_missing("distill_loss", device):
        faults.leave_out(OURS_CUDA, reason)
    else:
        for backend in (CUDA, TRITON):
            makers[f"{OURS} {backend}"] = lambda device, b=backend: on(b, _plain(lissom_loss(KL)))
    point, result = _measure(
        makers,
        [student],
        [teacher],
        (total, [exact]),
        MIN_DB["logits"],
        f"{rows}x{vocab}",
        faults,
        floor,
        until,
        rounds,
    )
    moved = 3 * student.nbytes
    for name, side in point["sides"].items():
        side["gb_per_s"] = moved / side["seconds"]["median"] / 1e9
        if "add" in result.rates:
            turns = zip(result.rates["add"], result.seconds[name], strict=True)
            side["share_of_floor"] = spread([moved / (rate * 1e9) / seconds for rate, seconds in turns])
    return {"rows": rows, "vocab": vocab, "bytes": moved, **point}


def measure_linear(
    tokens: int,
    size: int,
    vocab: int,
    device: torch.device,
    faults: Faults,
    probes: dict[str, Callable[[], float]],
    until: float,
    rounds: tuple[int, int],
) -> dict[str, Any]:
    """A point of ``linear_distill_loss``: four products of tokens × size × vocab, however it is computed."""
    generator = torch.Generator(device).manual_seed(tokens + vocab)
    states = torch.randn(2, tokens, size, generator=generator, device=device).bfloat16()
    heads = torch.randn(2, vocab, size, generator=generator, device=device).bfloat16() * (2 / size**0.5)
    total, hidden = 0.0, torch.empty(tokens, size, device=device)
    weight = torch.zeros(vocab, size, dtype=torch.float64, device=device)
    options = DistillOptions(temperature=TEMPERATURE)
    for part in torch.arange(tokens, device=device).split(max(1, CHECK_ELEMENTS // vocab)):
        losses, gradients = linear_page(
            (states[0][part], heads[0], None),
            (states[1][part], heads[1], None),
            None,
            options,
            term_scale=1 / tokens,
        )
        total += float(losses.sum())
        hidden[part] = gradients.hidden.float()
        weight += gradients.weight
        del losses, gradients
    floor = {name: probe for name, probe in probes.items() if name == "bf16"}
    point, result = _measure(
        _LINEAR,
        [states[0], heads[0]],
        [states[1], heads[1]],
        (total, [hidden, weight.float()]),
        MIN_DB["linear"],
        f"{tokens}x{size}x{vocab}",
        faults,
        floor,
        until,
        rounds,
    )
    operations = 8 * tokens * size * vocab
    for name, side in point["sides"].items():
        side["tflop_per_s"] = operations / side["seconds"]["median"] / 1e12
        if "bf16" in result.rates:
            turns = zip(result.rates["bf16"], result.seconds[name], strict=True)
            side["share_of_peak"] = spread([operations / (rate * 1e12) / seconds for rate, seconds in turns])
    return {"tokens": tokens, "hidden": size, "vocab": vocab, "operations": operations, **point}
