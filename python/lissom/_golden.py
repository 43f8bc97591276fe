"""The golden call of a saved model: an input, and a sample of what the model returned for it.

It is run again on load, so that altered weights, changed model code or a wrong kernel do not go unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._manifest import FLOATS, MANIFEST, RESERVED, WEIGHTS, FormatError, altered, is_size, short
from .compress.inputs import Call, as_call, evaluating, run, tensors_in, trimmed

__all__ = ["TOLERANCE", "check", "parse", "record"]

TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest relative error (RMS of the difference over RMS of the golden output) by output dtype.

Layers with int8 activations are bit-identical everywhere, but the float parts between them (attention,
normalization) round differently with another CPU or number of threads, and such a difference can move an
activation to the next of its 127 levels. Altered weights are off by far more."""

_SAMPLE = 4096


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    """JSON form of a call's arguments; tensors are appended to ``tensors``. TypeError for anything else."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, tensors) for item in value]}
    is_float = isinstance(value, float) and math.isfinite(value)
    if value is None or is_float or isinstance(value, bool | int | str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _decode(node: Any, tensors: Sequence[Tensor]) -> Any:
    """Inverse of :func:`_encode`; ValueError names a node that is not valid."""
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(f"{short(node)} is not an argument")
    ((kind, value),) = node.items()
    if kind == "tensor" and is_size(value) and value < len(tensors):
        return tensors[value]
    if kind == "dict" and isinstance(value, dict):
        return {key: _decode(item, tensors) for key, item in value.items()}
    if kind in ("tuple", "list") and isinstance(value, list):
        items = [_decode(item, tensors) for item in value]
        return tuple(items) if kind == "tuple" else items
    if kind == "value" and (value is None or isinstance(value, bool | int | float | str)):
        return value
    raise ValueError(f"{short(node)} is not an argument")


def _sample(tensor: Tensor) -> Tensor:
    """At most 4096 evenly spaced elements, on the CPU."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() > _SAMPLE:
        flat = flat[torch.arange(_SAMPLE, device=flat.device) * flat.numel() // _SAMPLE]
    return flat.cpu()


def _outputs(model: nn.Module, call: Call, what: str) -> list[Tensor]:
    """Samples of the floating tensors that the call returns."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    with evaluating(model):
        result = run(model, call.map_tensors(lambda t: t.to(device)), what)
        return [_sample(t) for t in tensors_in(result) if t.dtype in FLOATS]


def record(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What ``lissom.json`` says of the golden call, and the tensors to store; (None, {}) without inputs.

    Raises:
        ValueError: the inputs hold what only pickle could store.
        RuntimeError: the model raises on them.
    """
    if example_inputs is None:
        return None, {}
    with evaluating(model):
        call = trimmed(model, as_call(example_inputs))
    inputs: list[Tensor] = []
    try:
        tree = {"args": _encode(list(call.args), inputs), "kwargs": _encode(call.kwargs, inputs)}
    except TypeError as error:
        raise ValueError(
            f"lissom.save: example_inputs hold a {error}, which cannot be stored without pickle; use "
            "tensors, numbers, strings, None, and tuples, lists or dicts of them"
        ) from error
    outputs = _outputs(model, call, "lissom.save: example_inputs")
    tensors = {f"{RESERVED}input.{i}": t for i, t in enumerate(inputs)}
    tensors |= {f"{RESERVED}output.{i}": t for i, t in enumerate(outputs)}
    return {**tree, "inputs": len(inputs), "outputs": len(outputs)}, tensors


def parse(
    folder: Path, golden: dict[str, Any] | None, tensors: Mapping[str, Tensor]
) -> tuple[Call, list[Tensor]] | None:
    """The stored call and the samples of its outputs; FormatError where entry and tensors do not fit."""
    path = folder / MANIFEST
    stored = {name for name in tensors if name.startswith(RESERVED)}
    names: dict[str, list[str]] = {"inputs": [], "outputs": []}
    if golden is not None:
        if set(golden) != {"args", "kwargs", "inputs", "outputs"}:
            raise altered(path, f"golden has the keys {short(sorted(golden))}")
        for kind in names:
            if not is_size(golden[kind]) or golden[kind] > len(stored):
                count = f"{WEIGHTS} holds {len(stored)} golden tensors"
                raise altered(path, f"golden.{kind}={short(golden[kind])}, but {count}")
            names[kind] = [f"{RESERVED}{kind[:-1]}.{i}" for i in range(golden[kind])]
    differ = stored.symmetric_difference(names["inputs"] + names["outputs"])
    if differ:
        raise altered(
            folder / WEIGHTS, f"the golden tensor {min(differ)!r} is missing, or not listed in {MANIFEST}"
        )
    if golden is None:
        return None
    try:
        inputs = [tensors[name] for name in names["inputs"]]
        args, kwargs = _decode(golden["args"], inputs), _decode(golden["kwargs"], inputs)
    except (ValueError, RecursionError) as error:
        raise altered(path, f"golden: {error}") from error
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise altered(path, "golden.args must be a list and golden.kwargs a dict")
    single = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
    return Call(tuple(args), kwargs, single), [tensors[name] for name in names["outputs"]]


def check(folder: Path, model: nn.Module, call: Call, expected: Sequence[Tensor]) -> None:
    """Run ``call`` and compare; FormatError where it raises or differs by more than TOLERANCE."""
    where = f"{folder / MANIFEST}: golden"
    blame = "the folder was altered, or the model's code is not what was saved. check=False loads it anyway"
    try:
        found = _outputs(model, call, "the golden input")
    except RuntimeError as error:
        reason = error.__cause__ or error
        raise FormatError(f"{where}: the input cannot be run ({reason}); {blame}") from error
    sizes, saved_sizes = [t.numel() for t in found], [t.numel() for t in expected]
    if sizes != saved_sizes:
        raise FormatError(f"{where}: float outputs of sizes {sizes}, saved were {saved_sizes}; {blame}")
    for i, (y, reference) in enumerate(zip(found, expected, strict=True)):
        found_error = _relative_error(y, reference)
        limit = TOLERANCE.get(y.dtype, TOLERANCE[torch.float32])
        if found_error > limit:
            raise FormatError(
                f"{where}: output {i} is off by {found_error:.3g} of its RMS, more than {limit}; {blame}"
            )


def _relative_error(y: Tensor, reference: Tensor) -> float:
    """RMS(y - reference) / RMS(reference); infinite unless the same elements of both are finite."""
    finite = reference.isfinite()
    if not torch.equal(finite, y.isfinite()):
        return math.inf
    y, reference = y[finite].double(), reference[finite].double()
    noise, signal = float((y - reference).square().sum()), float(reference.square().sum())
    if noise == 0:
        return 0.0
    return math.sqrt(noise / signal) if signal else math.inf
