"""``lissom.json``: its fields, and the checks that do not need the tensors or a model.

The file is untrusted input: class names come from closed tables, file names are plain, every field has its
type. See :mod:`lissom.io` for what the fields mean.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import formats
from .nn import Int4Embedding, Int4Linear, Int8Embedding, Int8Linear, SparseLinear
from .nn._compressed import CompressedModule
from .reference.numerics import ACTIVATION_FUNCTIONS

__all__ = [
    "FLOATS",
    "FORMAT_VERSION",
    "LAYERS",
    "MANIFEST",
    "RESERVED",
    "WEIGHTS",
    "FormatError",
    "Manifest",
    "altered",
    "dtype_name",
    "dtype_of",
    "is_size",
    "read",
    "short",
    "write",
]

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
MANIFEST = "lissom.json"
RESERVED = "__lissom__."
"""Tensors whose names start so are not the model's: the golden input and output."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_BYTES = 64 * 2**20


class FormatError(ValueError):
    """A saved folder that cannot be used as it is; names the file, the value and the fix."""


def altered(path: Path, what: str) -> FormatError:
    """The error for a file that is inconsistent with what ``lissom.save`` writes."""
    return FormatError(f"{path}: {what}; the folder was altered, copy it again from where it was saved")


@dataclass(frozen=True)
class Layer:
    """How one layer class is written down and checked.

    Attributes:
        cls: the class.
        describe: a layer's constructor arguments; dtypes by name.
        check: by argument, whether its type and range are right; what goes together is the constructor's.
        fault: given (its full name, a layer, tensors for it of the right shapes and dtypes), what is wrong
            with their values, or ``""``.
    """

    cls: type[CompressedModule]
    describe: Callable[[Any], dict[str, Any]]
    check: dict[str, Callable[[Any], bool]]
    fault: Callable[[str, Any, Mapping[str, Tensor]], str]


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_choice(value: Any) -> bool:
    """Whether it can be a named option; the constructor knows the names."""
    return value is None or isinstance(value, str)


def _is_dtype(value: Any) -> bool:
    return value in map(dtype_name, FLOATS)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _int8_fault(name: str, layer: CompressedModule, tensors: Mapping[str, Tensor]) -> str:
    if bool((tensors["qweight"] == -128).any()):
        return f"{_key(name, 'qweight')!r} holds -128, outside [-127, 127]"
    for key in ("weight_scale", "input_scale"):
        scale = tensors.get(key)
        if scale is None:
            continue
        bad = ~(scale.isfinite() & (scale >= 0))
        if key == "input_scale":
            bad |= scale == 0
        if bool(bad.any()):
            value = float(scale[bad].reshape(-1)[0])
            return f"{_key(name, key)!r} holds {value}; a scale must be finite and not negative"
    return ""


def _int4_fault(name: str, layer: Int4Linear | Int4Embedding, tensors: Mapping[str, Tensor]) -> str:
    try:
        formats.check_int4(layer._record(tensors), repr(name) if name else "the layer")
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _block_sparse_fault(name: str, layer: SparseLinear, tensors: Mapping[str, Tensor]) -> str:
    try:
        formats.check_block_sparse(layer._record(tensors), repr(name) if name else "the layer")
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _is_block_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_size(side) and side for side in value)


def _key(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _int4_description(layer: Int4Linear | Int4Embedding) -> dict[str, Any]:
    zero_point = layer.zero_point
    return {
        "group_size": layer.group_size,
        "symmetric": zero_point is None,
        "scale_dtype": dtype_name(layer.weight_scale.dtype),
        "zero_dtype": dtype_name(torch.uint8 if zero_point is None else zero_point.dtype),
        "dtype": dtype_name(layer._like.dtype),
    }


_INT4_CHECKS: dict[str, Callable[[Any], bool]] = {
    "group_size": lambda v: type(v) is int,
    "symmetric": _is_bool,
    "scale_dtype": lambda v: v in map(dtype_name, formats.INT4_SCALE_DTYPES),
    "zero_dtype": lambda v: v in map(dtype_name, formats.INT4_ZERO_DTYPES),
    "dtype": _is_dtype,
}
LAYERS: dict[str, Layer] = {
    "Int8Linear": Layer(
        Int8Linear,
        lambda m: {
            "in_features": m.in_features,
            "out_features": m.out_features,
            "bias": m.bias is not None,
            "activation": m.activation,
            "act_fn": m.act_fn,
            "rotated": m.rotated,
            "dtype": dtype_name(m._like.dtype),
        },
        {
            "in_features": is_size,
            "out_features": is_size,
            "bias": _is_bool,
            "activation": _is_choice,
            "act_fn": _is_choice,
            "rotated": _is_bool,
            "dtype": _is_dtype,
        },
        _int8_fault,
    ),
    "Int8Embedding": Layer(
        Int8Embedding,
        lambda m: {
            "num_embeddings": m.num_embeddings,
            "embedding_dim": m.embedding_dim,
            "padding_idx": m.padding_idx,
            "dtype": dtype_name(m._like.dtype),
        },
        {
            "num_embeddings": is_size,
            "embedding_dim": is_size,
            "padding_idx": lambda v: v is None or is_size(v),
            "dtype": _is_dtype,
        },
        _int8_fault,
    ),
    "Int4Linear": Layer(
        Int4Linear,
        lambda m: {
            "in_features": m.in_features,
            "out_features": m.out_features,
            "bias": m.bias is not None,
            "codebook": m.codebook_scope,
            "group_index": m.group_index is not None,
            "activation": m.activation,
            "act_fn": m.act_fn,
            "rotated": m.rotated,
            **_int4_description(m),
        },
        {
            "in_features": is_size,
            "out_features": is_size,
            "bias": _is_bool,
            "codebook": _is_choice,
            "group_index": _is_bool,
            "activation": _is_choice,
            "act_fn": _is_choice,
            "rotated": _is_bool,
            **_INT4_CHECKS,
        },
        _int4_fault,
    ),
    "Int4Embedding": Layer(
        Int4Embedding,
        lambda m: {
            "num_embeddings": m.num_embeddings,
            "embedding_dim": m.embedding_dim,
            "padding_idx": m.padding_idx,
            **_int4_description(m),
        },
        {
            "num_embeddings": is_size,
            "embedding_dim": is_size,
            "padding_idx": lambda v: v is None or is_size(v),
            **_INT4_CHECKS,
        },
        _int4_fault,
    ),
    "SparseLinear": Layer(
        SparseLinear,
        lambda m: {
            "in_features": m.in_features,
            "out_features": m.out_features,
            "bias": m.bias is not None,
            "block_shape": list(m.block_shape),
            "blocks": m.values.shape[0],
            "act_fn": m.act_fn,
            "dtype": dtype_name(m.values.dtype),
            "floating_dtype": dtype_name(m._like.dtype),
        },
        {
            "in_features": is_size,
            "out_features": is_size,
            "bias": _is_bool,
            "block_shape": _is_block_shape,
            "blocks": is_size,
            "act_fn": _is_choice,
            "dtype": lambda v: v in map(dtype_name, formats.BLOCK_SPARSE_DTYPES),
            "floating_dtype": _is_dtype,
        },
        _block_sparse_fault,
    ),
}


@dataclass(frozen=True)
class Manifest:
    """``lissom.json``; the module's docstring explains the fields."""

    written_by: dict[str, Any]
    files: dict[str, dict[str, Any]]
    build: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    fused: dict[str, str] = field(default_factory=dict)
    shared_modules: dict[str, str] = field(default_factory=dict)
    tied: list[list[str]] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    training: dict[str, bool] = field(default_factory=dict)
    buffer_dtypes: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    golden: dict[str, Any] | None = None


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and is_size(value.get("bytes")) and isinstance(value.get("sha256"), str)


_FIELD_TYPES: dict[str, tuple[type[dict[str, Any]] | type[list[Any]], Callable[[Any], bool]]] = {
    "written_by": (dict, lambda _: True),
    "files": (dict, _is_fingerprint),
    "build": (dict, lambda _: True),
    "layers": (dict, lambda v: isinstance(v, dict) and isinstance(v.get("args"), dict)),
    "fused": (dict, lambda v: v in ACTIVATION_FUNCTIONS),
    "shared_modules": (dict, lambda v: isinstance(v, str)),
    "tied": (list, lambda v: isinstance(v, list) and len(v) > 1 and all(isinstance(n, str) for n in v)),
    "frozen": (list, lambda v: isinstance(v, str)),
    "training": (dict, _is_bool),
    "buffer_dtypes": (dict, _is_dtype),
    "recipe": (dict, lambda _: True),
    "report": (dict, lambda _: True),
    "golden": (dict, lambda _: True),
}
_OPTIONAL = ("recipe", "report", "golden")


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def read(folder: Path) -> Manifest:
    """The checked ``lissom.json`` of ``folder``; FormatError where there is none, or a field is not valid."""
    path = folder / MANIFEST
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FormatError(f"{folder}: {what}; give the folder that lissom.save wrote")
    if not path.is_file():
        raise FormatError(
            f"{folder}: holds no {MANIFEST}, so lissom did not save it; give a folder that lissom.save wrote "
            f"or compress this one: lissom compress {folder} --recipe int8 --out DIR"
        )
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise altered(path, f"{size} bytes is more than any {MANIFEST} needs")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: not valid JSON ({error}); the file is truncated or altered, copy it again"
        ) from error
    if not isinstance(data, dict) or data.get("format") != "lissom":
        raise FormatError(f"{path}: its 'format' is not 'lissom'; the file was not written by lissom.save")
    version = data.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise altered(path, f"format_version={short(version)} is not a version number")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version={version} is newer than the {FORMAT_VERSION} that this lissom reads; "
            "upgrade with pip install -U lissom"
        )
    return _check_manifest(path, data)


def _check_manifest(path: Path, data: dict[str, Any]) -> Manifest:
    known = {f.name for f in dataclasses.fields(Manifest)}
    unknown = data.keys() - known - {"format", "format_version"}
    if unknown:
        raise altered(path, f"unknown key {short(min(unknown))}")
    for name, (kind, check) in _FIELD_TYPES.items():
        if name not in data:
            raise altered(path, f"the key {name!r} is missing")
        value = data[name]
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, kind):
            raise altered(path, f"{name} must be a {kind.__name__}, got {short(value)}")
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if not check(item):
                raise altered(path, f"{name}[{short(key)}]={short(item)} is not valid")
    manifest = Manifest(**{name: data[name] for name in known})
    for name in manifest.files:
        if name in ("", ".", "..", MANIFEST) or Path(name).name != name or "\\" in name or "\0" in name:
            raise altered(path, f"files[{short(name)}] is not a plain file name")
    if WEIGHTS not in manifest.files:
        raise altered(path, f"files does not list {WEIGHTS}")
    return manifest


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def write(folder: Path, manifest: Manifest) -> None:
    """Write ``lissom.json``."""
    content = {"format": "lissom", "format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
