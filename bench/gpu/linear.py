"""int8 and int4 linear layers over the grid, with cuBLAS, ``torch._int_mm`` and torch's int4 kernel.

bfloat16 in and out, with a bias. Sides:

* ``torch bf16``: ``F.linear``, on a GPU cuBLAS.
* ``lissom int8``: activations quantized per row in the call; ``… rotated``: as ``compress_`` makes it;
  ``… weight-only``: bfloat16 activations.
* ``lissom int4``: groups of 128 with zero-points, bfloat16 activations; ``… int8``: int8 activations.
  Without more, what lissom chooses; ``… cuda``, ``… triton``: by these kernels, where CUDA C++ can run.
* ``torch._int_mm``: rows quantized, product, scales and bias in eager mode; ``… compiled``: by torch.compile.
* ``torch int4pack``: ``_weight_int4pack_mm``, groups of 128.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lissom
from bench.runner import SUSPECT_SQNR_DB, Rounds, spread, sqnr_db
from lissom.testing import use

from .timing import CUDA, TRITON, Faults, Side, cuda_missing, first_line, on, paired, rotations, timed_eagerly

__all__ = [
    "BASELINE",
    "INT4",
    "INT4PACK",
    "INT4_CUDA",
    "INT4_TRITON",
    "INT8",
    "INT8_CUDA",
    "INT8_TRITON",
    "INT_MM",
    "Contender",
    "Grid",
    "Layer",
    "check_rows",
    "make_dense",
    "measure",
    "on_gpu",
    "rotated",
    "rounds_done",
    "timing",
]

BASELINE = "torch bf16"
INT8, INT4 = "lissom int8", "lissom int4"
INT8_CUDA, INT4_CUDA = f"{INT8} {CUDA}", f"{INT4} {CUDA}"
INT8_TRITON, INT4_TRITON = f"{INT8} {TRITON}", f"{INT4} {TRITON}"
INT_MM, INT4PACK = "torch._int_mm", "torch int4pack"

GROUP = 128

CHECKED_ROWS = 64
"""Rows that are held to the reference, which is slow; all rows are held to the dense layer."""

MIN_DB = {"bits": math.inf, "reference": 45.0}
"""SQNR of a side of lissom against the reference on the same device: the int8 contract promises bits; what is
summed in float32 and rounded once to bfloat16 differs from it by a last bit now and then (50 dB and more)."""

MIN_TO_DENSE_DB = {8: 25.0, 4: 12.0}
"""…and against the dense layer, by bits of the weight: a wrong scale, or swapped halves, give nothing."""

EAGER = (BASELINE, INT8, INT4)
"""Sides that are timed as eager code launches them, too."""


@dataclass(frozen=True)
class Grid:
    """(K, N) × M, and where ``torch.compile`` is tried, whose compilations take long."""

    shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    compiled: Sequence[tuple[int, int, int]] = ()
    more: Sequence[tuple[int, int, int]] = ()
    """(K, N, M) beyond the grid."""

    def rows_of(self, k: int, n: int) -> list[int]:
        return [*self.rows, *(m for *shape, m in self.more if shape == [k, n])]

    @property
    def points(self) -> int:
        return len(self.shapes) * len(self.rows) + len(self.more)


FULL = Grid(
    shapes=((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672)),
    rows=(1, 16, 64, 256, 1024, 4096),
    compiled=((4096, 4096, 1024), (4096, 14336, 4096)),
    more=((8192, 8192, 8192),),
)
QUICK_GPU = Grid(shapes=((4096, 4096),), rows=(1, 16, 1024))
QUICK_CPU = Grid(shapes=((128, 32),), rows=(1, 17))


@dataclass
class Contender:
    """One side for all M of a shape.

    Attributes:
        build: makes the function ``[M, K] → [M, N]`` on tensors of its own, each time it is called.
        weight_bytes: what one call has to read of weights and scales.
        bits: of the weight.
        peak: what it multiplies: ``"int8"`` or ``"bf16"``.
        reference: what the function must give, and how exactly (a key of ``MIN_DB``); lissom's sides only.
    """

    name: str
    build: Callable[[], Callable[[Tensor], Tensor]]
    weight_bytes: int
    bits: int
    peak: str
    reference: tuple[Callable[[Tensor], Tensor], str] | None = None
    functions: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def copies(self, device: torch.device) -> list[Callable[[Tensor], Tensor]]:
        """As many functions as rotation needs, made once."""
        if not self.functions:
            self.functions = [self.build() for _ in range(rotations(self.weight_bytes, device))]
        return self.functions


class Layer:
    """One (K, N): its dense weights, and the contenders made of them; what cannot be made is a fault."""

    def __init__(self, k: int, n: int, device: torch.device, faults: Faults) -> None:
        self.k, self.n, self.device = k, n, device
        self.dense = make_dense(k, n, device)
        self.contenders: list[Contender] = []
        for name, make in _makers(device, faults).items():
            try:
                self.contenders.append(make(name, self.dense))
            except Exception as error:  # too old a torch, no memory, a shape that does not divide, …
                faults.add(name, f"{k}x{n}", first_line(error))


def on_gpu(tensor: Tensor) -> bool:
    """For peers that are written for nothing else."""
    return tensor.is_cuda


def make_dense(k: int, n: int, device: torch.device) -> nn.Linear:
    """bfloat16, normally distributed, the same on every call."""
    generator = torch.Generator(device).manual_seed(1000 * k + n)
    dense = nn.Linear(k, n, device="meta", dtype=torch.bfloat16)
    weight = torch.randn(n, k, generator=generator, device=device) * k**-0.5
    bias = torch.randn(n, generator=generator, device=device) * k**-0.5
    dense.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    dense.bias = nn.Parameter(bias.bfloat16(), requires_grad=False)
    return dense.eval()


def held_bytes(layer: nn.Module) -> int:
    """Of the tensors that a compressed layer saves, but for the bias: what a call reads at least."""
    return sum(tensor.nbytes for name, tensor in layer.state_dict().items() if name != "bias")


# ------------------------------------------------------------------------------------------- sides


def _torch_bf16(name: str, dense: nn.Linear) -> Contender:
    def build() -> Callable[[Tensor], Tensor]:
        weight, bias = dense.weight.clone(), dense.bias
        return lambda x: F.linear(x, weight, bias)

    return Contender(name, build, dense.weight.nbytes, 16, "bf16")


def _compressed(name: str, layer: nn.Module, bits: int, peak: str, exactness: str) -> Contender:
    layer = layer.requires_grad_(False).eval()

    def reference(x: Tensor) -> Tensor:
        with use("reference"):
            y: Tensor = layer(x)
        return y

    return Contender(
        name, lambda: copy.deepcopy(layer).forward, held_bytes(layer), bits, peak, (reference, exactness)
    )


def _lissom_int8(config: lissom.Int8) -> Callable[[str, nn.Linear], Contender]:
    peak, exactness = ("bf16", "reference") if config.activation is None else ("int8", "bits")
    make = lissom.nn.Int8Linear.from_linear
    return lambda name, dense: _compressed(name, make(dense, config), 8, peak, exactness)


def _lissom_int4(config: lissom.Int4) -> Callable[[str, nn.Linear], Contender]:
    peak = "bf16" if config.activation is None else "int8"
    make = lissom.nn.Int4Linear.from_linear
    return lambda name, dense: _compressed(name, make(dense, config), 4, peak, "reference")


def _quantized_product(q: Tensor, w_scale: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """What one writes with ``torch._int_mm``: q int8 ``[K, N]``, float32 scales and bias ``[N]``."""
    absmax = x.abs().amax(-1, keepdim=True).float()
    qx = (x * (127 / absmax)).round_().to(torch.int8)
    y = torch._int_mm(qx, q) * (absmax / 127)
    return y.mul_(w_scale).add_(bias).to(x.dtype)


def _int_mm(name: str, dense: nn.Linear, compiled: bool = False) -> Contender:
    quantized, scale = lissom.formats.quantize_int8(dense.weight)
    bias = dense.bias.float()
    run: Callable[..., Tensor] = _quantized_product
    if compiled:  # once for all copies
        run = torch.compile(_quantized_product, fullgraph=True, dynamic=False)

    def build() -> Callable[[Tensor], Tensor]:
        return partial(run, quantized.clone().t(), scale.clone(), bias)

    return Contender(name, build, quantized.nbytes + scale.nbytes, 8, "int8")


def _int4pack(name: str, dense: nn.Linear) -> Contender:
    """A scale and an offset per group, both bfloat16: the value of a code is (code - 8) · scale + offset."""
    if not on_gpu(dense.weight):
        raise NotImplementedError("its layout is the GPU's")
    groups = dense.weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / 15).clamp_min(1e-12).bfloat16()
    offset = (low + 8 * scale.float()).bfloat16()
    codes = (groups - offset.float()[..., None]) / scale.float()[..., None] + 8
    codes = codes.round_().clamp_(0, 15).to(torch.uint8).flatten(1)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale_and_offset = torch.stack([scale.t(), offset.t()], -1).contiguous()
    bias = dense.bias

    def build() -> Callable[[Tensor], Tensor]:
        own, scales = packed.clone(), scale_and_offset.clone()
        return lambda x: torch._weight_int4pack_mm(x, own, GROUP, scales).add_(bias)

    return Contender(name, build, packed.nbytes + scale_and_offset.nbytes, 4, "bf16")


_MAKERS: dict[str, Callable[[str, nn.Linear], Contender]] = {
    BASELINE: _torch_bf16,
    INT8: _lissom_int8(lissom.Int8()),
    f"{INT8} rotated": _lissom_int8(lissom.Int8(rotation=True)),
    f"{INT8} weight-only": _lissom_int8(lissom.Int8(activation=None)),
    INT4: _lissom_int4(lissom.Int4(activation=None, method="rtn")),
    f"{INT4} int8": _lissom_int4(lissom.Int4(method="rtn")),
    INT_MM: _int_mm,
    INT4PACK: _int4pack,
}


def _by(backend: str, make: Callable[[str, nn.Linear], Contender]) -> Callable[[str, nn.Linear], Contender]:
    """What is cached beside the weights is made for the backend as well."""

    def build(name: str, dense: nn.Linear) -> Contender:
        one = on(backend, make)(name, dense)
        return replace(one, build=on(backend, lambda: on(backend, one.build())))

    return build


def _makers(device: torch.device, faults: Faults) -> dict[str, Callable[[str, nn.Linear], Contender]]:
    found = dict(_MAKERS)
    for op, name in (("int8_linear", INT8), ("int4_linear", INT4), ("int4_linear", f"{INT4} int8")):
        if reason := cuda_missing(op, device):
            faults.leave_out(f"{name} {CUDA}", reason)
        elif name in _MAKERS:
            found |= {f"{name} {backend}": _by(backend, _MAKERS[name]) for backend in (CUDA, TRITON)}
    return found


# ------------------------------------------------------------------------------------------- points


def check_rows(m: int) -> Tensor:
    """Numbers of the rows that are held to the reference: evenly spaced, first and last among them."""
    return torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).round().long()


def _checked(one: Contender, x: Tensor, dense: Tensor) -> dict[str, float]:
    """SQNR in dB against the dense layer and, on some rows, the reference.

    Raises:
        AssertionError: a side of lissom is below the bar; what is wrong is not timed.
    """
    y = one.functions[0](x)
    if y.shape != dense.shape or y.dtype != dense.dtype:
        raise AssertionError(f"result is {y.dtype} {tuple(y.shape)}, not {dense.dtype} {tuple(dense.shape)}")
    found = {"sqnr_to_dense_db": sqnr_db(dense, y)}
    if one.reference is None:
        return found
    rows = check_rows(x.shape[0]).to(x.device)
    function, exactness = one.reference
    found["sqnr_to_reference_db"] = sqnr_db(function(x[rows]), y[rows])
    for key, bar in (("to_reference", MIN_DB[exactness]), ("to_dense", MIN_TO_DENSE_DB[one.bits])):
        if not found[f"sqnr_{key}_db"] >= bar:
            against = "the reference" if key == "to_reference" else "the dense layer"
            raise AssertionError(
                f"wrong: SQNR {found[f'sqnr_{key}_db']:.1f} dB against {against}, below {bar:g}"
            )
    return found


def measure(
    layer: Layer,
    m: int,
    faults: Faults,
    probes: dict[str, Callable[[], float]],
    until: float,
    compiled: bool,
    rounds: tuple[int, int],
) -> dict[str, Any]:
    """One point: check, time, figures."""
    k, n, device = layer.k, layer.n, layer.device
    where = f"M={m} {k}x{n}"
    generator = torch.Generator(device).manual_seed(m)
    count = rotations(2 * m * k, device)
    xs = [torch.randn(m, k, generator=generator, device=device).bfloat16() for _ in range(count)]
    sides, checked, contenders = [], {}, {}
    extra = [_int_mm(f"{INT_MM} compiled", layer.dense, compiled=True)] if compiled else []
    with torch.inference_mode():
        expected = F.linear(xs[0].float(), layer.dense.weight.float(), layer.dense.bias.float()).bfloat16()
        for one in [*layer.contenders, *extra]:
            try:
                functions = one.copies(device)
                checked[one.name] = _checked(one, xs[0], expected)
            except Exception as error:
                faults.add(one.name, where, first_line(error))
                continue
            # Where activations are the larger part, they are what is rotated.
            turns = max(len(functions), count if one.weight_bytes < 2 * m * k else 1)
            sides.append(Side(one.name, rotated(functions, xs, turns)))
            contenders[one.name] = one
    del expected
    eager: dict[str, float] = {}
    result, notes = paired(sides, device, where, faults, probes=probes, until=until, rounds=rounds, seed=m)
    for side in sides:
        if side.name in EAGER and side.name in result.seconds:
            with torch.inference_mode():
                eager[side.name] = timed_eagerly(side, device)
    found = {}
    for name in result.seconds:
        one = contenders[name]
        moved = one.weight_bytes + 2 * (m * k + m * n + n)
        found[name] = {
            **timing(result, name, moved, 2 * m * k * n, one.peak),
            **checked[name],
            "suspect": checked[name]["sqnr_to_dense_db"] < MIN_TO_DENSE_DB.get(one.bits, SUSPECT_SQNR_DB),
            "eager_seconds": eager.get(name),
            "note": notes.get(name, ""),
        }
    return {"k": k, "n": n, "m": m, "rounds": rounds_done(result), "sides": found}


def rotated(
    functions: Sequence[Callable[[Tensor], Tensor]], xs: Sequence[Tensor], turns: int
) -> list[Callable[[], Tensor]]:
    """``turns`` calls that go round the functions and the inputs."""
    return [partial(functions[i % len(functions)], xs[i % len(xs)]) for i in range(turns)]


def rounds_done(result: Rounds) -> int:
    """How many there were."""
    return min(map(len, result.seconds.values()), default=0)


def timing(result: Rounds, name: str, moved: int, operations: int, peak: str) -> dict[str, Any]:
    """Time, rates, paired ratios to every other side, and paired shares of what the GPU can do at best.

    Shares: of HBM's read bandwidth, of the dense ``peak``, and of the floor, which is the slower of the two.
    """
    seconds = spread(result.seconds[name])
    found: dict[str, Any] = {
        "seconds": seconds,
        "bytes": moved,
        "gb_per_s": moved / seconds["median"] / 1e9,
        "top_per_s": operations / seconds["median"] / 1e12,
        "speedup_over": {
            other: spread(result.ratio(other, name)) for other in result.seconds if other != name
        },
    }
    least = {  # seconds at best, in every round
        key: [amount / rate for rate in result.rates[kind]]
        for key, kind, amount in (("hbm", "read", moved / 1e9), ("peak", peak, operations / 1e12))
        if kind in result.rates
    }
    if len(least) == 2:
        least["floor"] = list(map(max, least["hbm"], least["peak"]))
    for key, best in least.items():
        pairs = zip(best, result.seconds[name], strict=True)
        found[f"share_of_{key}"] = spread([a / b for a, b in pairs])
    return found
