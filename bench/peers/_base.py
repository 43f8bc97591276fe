"""The interface of every side of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Peer", "Precision", "Prepared", "Unfit", "exact_linear"]

Precision = Literal["fp32", "bf16", "int8", "weight-only int8", "int4", "weight-only int4"]


class Unfit(ValueError):
    """The peer cannot take this shape; the text says why."""


def _same(value: Any) -> Any:
    return value


@dataclass
class Prepared:
    """A linear layer that is ready to be timed.

    Attributes:
        run: the timed call; takes what ``feed`` returned.
        weight_bytes: bytes of weights that one call has to read.
        feed: untimed: turns a float32 tensor ``[M, K]`` into what the side's own users hold (a NumPy view, an
            IO binding). It must not do any of the work of the call.
        result: untimed: turns what ``run`` returned into a tensor ``[M, N]``.
        exact: the layer in float64 arithmetic on the side's own dequantized weights, ``[M, K]`` to
            ``[M, N]``; for so few bits that the choice of the weights would hide what the kernel does.
        element_bytes: bytes of an element of input and output as they are handed over.
    """

    run: Callable[[Any], Any]
    weight_bytes: int
    feed: Callable[[Tensor], Any] = _same
    result: Callable[[Any], Tensor] = _same
    exact: Callable[[Tensor], Tensor] | None = None
    element_bytes: int = 4

    def __call__(self, x: Tensor) -> Tensor:
        """The whole call, tensor to tensor (for checks and simple timing)."""
        with torch.inference_mode():
            return self.result(self.run(self.feed(x)))


def exact_linear(weight: Callable[[], Tensor], bias: Tensor) -> Callable[[Tensor], Tensor]:
    """:attr:`Prepared.exact` of the weights ``[N, K]`` that ``weight`` returns (made anew for each call)."""
    return lambda x: (x.double() @ weight().double().t() + bias.double()).float()


class Peer(Protocol):
    """One side: ``name`` for tables, ``precision`` of its arithmetic."""

    name: str
    precision: Precision

    def available(self) -> str:
        """Why this peer cannot run here, or ``""``."""
        ...

    def prepare(self, weight: Tensor, bias: Tensor, m: int, threads: int) -> Prepared:
        """The layer ``x @ weight.T + bias``; float32 ``[m, K]``, ``[N, K]`` and ``[N]``.

        Raises:
            Unfit: the peer cannot take this shape.
        """
        ...
