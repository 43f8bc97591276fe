"""Triton's interpreter, mended where it computes other bits than a GPU. For tests only.

In Triton 3.6 its fused multiply-add rounds twice, float32 to bfloat16 is cut off, or rounded half up without
a carry into the exponent, and a product of bfloat16 tiles multiplies their bits as integers. With NumPy 2.4 a
loop over a range that is only known at run time fails. It has no inline assembly: the few instructions of PTX
that our kernels write are computed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["mend"]


def _fma(x: Any, y: Any, z: Any) -> Any:
    """float32 with one rounding: see ``reference/numerics.fma``."""
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y.astype(np.float64)
        addend = z.astype(np.float64)
        total = product + addend
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        bits = np.atleast_1d(total).view(np.int64)
        inexact = (
            np.isfinite(total) & np.isfinite(error) & (error != 0) & ((bits & 1) == 0).reshape(total.shape)
        )
        toward = np.where(error > 0, np.inf, -np.inf)
        return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def _to_bfloat16(x: Any) -> Any:
    bits = np.atleast_1d(x).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    nan = (bits >> 16) | 0x40
    return np.where(np.isnan(np.atleast_1d(x)), nan, rounded).astype(np.uint16).reshape(x.shape)


def _from_bfloat16(x: Any) -> Any:
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.uint32)


def _halves(register: Any, sixteen: Callable[[Any], Any]) -> list[Any]:
    return [sixteen((register >> shift).astype(np.uint16)).astype(np.float64) for shift in (0, 16)]


def _fma_of_pairs(bfloat16: bool, *registers: Any) -> Any:
    """Two numbers of 16 bits a register. One rounding more than ``fma.rn`` has, which ours never need."""

    def widen(bits: Any) -> Any:
        return _from_bfloat16(bits).view(np.float32) if bfloat16 else bits.view(np.float16)

    def narrow(value: Any) -> Any:
        value = value.astype(np.float32) if bfloat16 else value.astype(np.float16)
        return (_to_bfloat16(value) if bfloat16 else value.view(np.uint16)).astype(np.uint32)

    a, b, c = (_halves(register, widen) for register in registers)
    low, high = (narrow(x * y + z) for x, y, z in zip(a, b, c, strict=True))
    return low | (high << 16)


def _permute(a: Any, b: Any, selector: Any) -> Any:
    """``prmt.b32``: four of eight bytes. Selectors with the first bit set (replicated signs) are not ours."""
    assert not np.any(selector & 0x8888)
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        chosen = ((selector >> np.uint32(4 * i)) & 7).astype(np.uint64) * np.uint64(8)
        result |= ((both >> chosen) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * i)
    return result


def _any_of_three(a: Any, b: Any, c: Any, table: Any) -> Any:
    """``lop3.b32``: bit by bit, the bit of ``table`` that the three number."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        if int(table) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _divide(a: Any, b: Any) -> Any:
    with np.errstate(all="ignore"):
        return (a.view(np.float32) / b.view(np.float32)).view(np.uint32)


_INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": _permute,
    "lop3.b32": _any_of_three,
    "fma.rn.bf16x2": functools.partial(_fma_of_pairs, True),
    "fma.rn.f16x2": functools.partial(_fma_of_pairs, False),
    "div.rn.f32": _divide,
    "setp.ne.b32": lambda a, b: a != b,
}


def _run_ptx(text: str, registers: dict[str, Any]) -> None:
    """Straight code of the instructions above; ``@p trap`` is the only branch. Registers: uint32 arrays."""
    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        if name.startswith("@"):
            assert rest == "trap"
            assert not np.any(registers[name[1:]]), "the kernel would stop: a trap"
            continue
        target, *sources = (operand.strip() for operand in rest.split(","))
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        registers[target] = _INSTRUCTIONS[name](*values)


def _inline_assembly(text: str, inputs: list[Any], types: list[Any], pack: int) -> list[Any]:
    """The outputs, as arrays like the inputs; ``pack`` elements (or as many as fit) share a register."""

    def together(size: int) -> int:
        return min(pack, 4 // size)

    registers: dict[str, Any] = {}
    outputs = []
    for kind in types:
        size = kind.scalar.primitive_bitwidth // 8
        outputs.append([f"${len(registers) + i}" for i in range(pack // together(size))])
        registers.update(dict.fromkeys(outputs[-1]))
    for array in inputs:
        array = np.ascontiguousarray(array)
        words = array.reshape(-1, pack // together(array.itemsize), together(array.itemsize))
        words = words.view(np.dtype(f"<u{array.itemsize * together(array.itemsize)}"))[..., 0].astype(
            np.uint32
        )
        for i in range(words.shape[1]):
            registers[f"${len(registers)}"] = words[:, i]
    _run_ptx(text, registers)
    results = []
    for kind, names in zip(types, outputs, strict=True):
        dtype = np.dtype(interpreter._get_np_dtype(kind.scalar))
        words = np.stack([registers[name] for name in names], axis=1)
        words = words.astype(np.dtype(f"<u{dtype.itemsize * together(dtype.itemsize)}"))
        results.append(words.view(dtype).reshape(inputs[0].shape))
    return results


class _Results(list):  # type: ignore[type-arg]
    get_result = list.__getitem__


@functools.cache
def mend() -> None:
    """Patch Triton's interpreter in this process."""
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    dot = builder.create_dot

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        assert x.data.dtype == y.data.dtype == z.data.dtype == np.float32, (
            "only float32 is fused in our kernels"
        )
        return interpreter.TensorHandle(_fma(x.data, y.data, z.data), z.dtype.scalar)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return _from_bfloat16(data)
        return convert(data, source, target, rounding)

    def widened(tile: Any) -> Any:
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        return interpreter.TensorHandle(_from_bfloat16(tile.data).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
    ) -> _Results:
        arrays = _inline_assembly(text, [value.data for value in values], types, pack)
        kinds = [kind.scalar for kind in types]
        return _Results(interpreter.TensorHandle(a, kind) for a, kind in zip(arrays, kinds, strict=True))

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # the scope, if any, restores it

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_fma = create_fma
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm
    interpreter._convert_float = convert_float
