"""Example inputs: how they are passed to the model, under which conditions, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "InputError", "as_call", "as_calls", "evaluating", "run", "tensors_in", "trimmed"]

GOLDEN_ROWS = 2
"""Batch rows of the example inputs that a model's record keeps."""


class InputError(ValueError):
    """The values seen inside the model are unusable (NaN, for example); passes :func:`run` unwrapped."""


@dataclass(frozen=True)
class Call:
    """One call of a model: ``model(*args, **kwargs)``. ``value`` rebuilds what the user gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    single: bool = False

    def __call__(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    @property
    def value(self) -> Any:
        """A tensor, a tuple (positional) or a dict (keyword)."""
        if self.single:
            return self.args[0]
        return self.kwargs if self.kwargs else self.args

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> Call:
        """The same call with ``fn`` applied to every tensor argument."""

        def apply(x: Any) -> Any:
            return fn(x) if isinstance(x, Tensor) else x

        return Call(tuple(map(apply, self.args)), {k: apply(v) for k, v in self.kwargs.items()}, self.single)


def as_call(value: object, what: str = "example_inputs") -> Call:
    """A tensor, a tuple or list (positional) or a mapping (keyword) as a :class:`Call`.

    Raises:
        TypeError: anything else.
        ValueError: nothing in it.
    """
    if isinstance(value, Tensor):
        return Call((value,), {}, single=True)
    if isinstance(value, Mapping):
        call = Call((), {str(k): v for k, v in value.items()})
    elif isinstance(value, tuple | list):
        call = Call(tuple(value), {})
    else:
        raise TypeError(
            f"{what} is a {type(value).__name__}; use a tensor, a tuple of positional arguments or a dict of "
            "keyword arguments for model(...)"
        )
    if not call.args and not call.kwargs:
        raise ValueError(f"{what}={value!r} is empty; give what model(...) is called with")
    return call


def as_calls(calibration: object) -> Iterator[Call]:
    """The batches of ``calibration`` one by one; TypeError where it is not an iterable of inputs."""
    if isinstance(calibration, Tensor | Mapping | str | bytes) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration is a {type(calibration).__name__}; use an iterable of inputs, such as "
            "[batch1, batch2] or a DataLoader that yields what model(...) takes"
        )
    return (as_call(batch, f"calibration batch {i}") for i, batch in enumerate(calibration))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Eval mode and no gradients inside; every module's training flag and the random state are restored.

    Yields the training flags as they were.

    ``no_grad`` rather than ``inference_mode``: what a model caches during a run must stay a normal tensor.
    """
    flags = {module: module.training for module in model.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            yield flags
    finally:
        for module, training in flags.items():
            module.training = training


RUNS_BY_ITSELF = "check that model(...) runs on these inputs by itself"


def run(model: nn.Module, call: Call, what: str, fix: str = RUNS_BY_ITSELF) -> Any:
    """``call(model)`` with a fixed seed; RuntimeError, chained, says that ``what`` made the model raise.

    :class:`InputError` and ``torch.OutOfMemoryError``, which is nobody's fault, pass as they are.
    """
    torch.manual_seed(0)
    try:
        return call(model)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(
            f"{what}: the model raised {type(error).__name__}: {error}; it was left unchanged. Please {fix}"
        ) from error


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses (Hugging Face outputs are mappings)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def trimmed(model: nn.Module, call: Call) -> Call:
    """``call`` detached, with its first two batch rows only where the model still runs on them.

    A batch dimension is taken to be the first one when all tensor arguments agree on its size.
    """
    detached = call.map_tensors(lambda t: t.detach().clone())
    tensors = list(tensors_in((call.args, call.kwargs)))
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) != 1 or sizes.pop() <= GOLDEN_ROWS:
        return detached
    short = call.map_tensors(lambda t: t[:GOLDEN_ROWS].detach().clone())
    try:
        run(model, short, "trimmed example_inputs")
    except RuntimeError:
        return detached
    return short
