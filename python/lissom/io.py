"""Compressed models as folders: ``model.safetensors`` + ``lissom.json``, written atomically, never pickle.

``model.safetensors`` holds the state of the model in the canonical (device-free) layout, each tied tensor
once, and the golden input and output. ``lissom.json`` (format version 1) holds what the tensors mean::

    format, format_version   "lissom", 1
    written_by               versions and the instruction set that made the golden output
    files                    name → bytes and sha256 of every other file in the folder
    build                    how to make the model: a transformers class, one layer, or the user's own module
    layers                   module name → layer class and constructor arguments
    fused                    activation modules whose function the linear before them computes
    shared_modules, tied     names that are one module, or one tensor
    frozen, training         requires_grad and train/eval flags
    buffer_dtypes            dtypes of the buffers that are not saved (they are rebuilt by the constructor)
    recipe, report           what ``compress_`` was asked and what it did, or null
    golden                   arguments of a call; the tensors are stored as ``__lissom__.input.<i>``, and an
                             evenly spaced sample of what came out as ``__lissom__.output.<i>``

A folder is untrusted input: everything in it is checked before any kernel sees it and before a given model
is changed, and every fault is a :class:`FormatError` that names the file, the value and the fix.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import _atomic, _golden, _native
from ._manifest import (
    FLOATS,
    FORMAT_VERSION,
    LAYERS,
    MANIFEST,
    RESERVED,
    WEIGHTS,
    FormatError,
    Manifest,
    altered,
    dtype_name,
    dtype_of,
    read,
    short,
    write,
)
from .compress.convert import kind_of, weight_shape
from .compress.fuse import recognise
from .compress.inputs import Call
from .compress.patch import Patch
from .compress.recipe import recipe_from_dict
from .compress.report import Report, get_record, set_record
from .nn import FusedActivation, SparseLinear
from .nn._compressed import CompressedModule

__all__ = ["FORMAT_VERSION", "MANIFEST", "WEIGHTS", "FormatError", "check_target", "inspect", "load", "save"]


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    overwrite: bool = False,
    extra_files: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write ``model`` as a folder that :func:`load` reads.

    The folder appears complete or not at all: a crash leaves what was there before. Files are not pickled.

    Args:
        model: any module; a Hugging Face model is saved with its config, so that ``load`` needs only the
            folder.
        folder: new or empty; or, with ``overwrite=True``, one that ``save`` wrote and that holds nothing
            else.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; two rows of it are
            kept with a sample of what the model returns, for the check in ``load``. None takes what
            ``compress_`` was given, if anything.
        overwrite: replace an earlier save.
        extra_files: files to keep beside the model, such as a tokenizer's.

    Returns:
        The folder's absolute path.

    Raises:
        FileExistsError: the folder holds something else, or an earlier save and ``overwrite`` is False.
        OSError: the folder cannot be written.
        ValueError: a tensor on the meta device or with a layout that cannot be saved; ``example_inputs`` that
            cannot be stored.
        RuntimeError: the model raises on ``example_inputs``.
    """
    from safetensors.torch import save_file

    target = Path(folder).resolve()
    check_target(target, overwrite)
    extras = _check_extras(extra_files)
    record = get_record(model) or {}
    if example_inputs is None:
        example_inputs = record.get("example_inputs")
    state = _state(model)
    tied = _tied(state)
    golden, tensors = _golden.record(model, example_inputs)
    once = state.keys() - {name for names in tied for name in names[1:]}
    tensors |= {name: tensor.detach() for name, tensor in state.items() if name in once}
    modules = dict(model.named_modules())
    layers = {name: _describe(m) for name, m in modules.items() if isinstance(m, CompressedModule)}

    with _atomic.replace_folder(target) as new:
        build = _write_build(model, new)
        for source in extras:
            shutil.copyfile(source, new / source.name)
        (new / WEIGHTS).touch()
        mode = (new / WEIGHTS).stat().st_mode
        save_file({name: _own(t) for name, t in tensors.items()}, new / WEIGHTS, metadata={"format": "pt"})
        (new / WEIGHTS).chmod(mode)  # safetensors makes it readable by its owner only
        manifest = Manifest(
            written_by=_written_by(),
            files={path.name: _fingerprint(path) for path in sorted(new.iterdir())},
            build=build,
            layers=layers,
            fused={name: m.act_fn for name, m in modules.items() if isinstance(m, FusedActivation)},
            shared_modules=_shared_modules(model, layers),
            tied=tied,
            frozen=[name for name, p in model.named_parameters() if not p.requires_grad],
            training={"": model.training}
            | {name: m.training for name, m in modules.items() if m.training != model.training},
            buffer_dtypes={
                name: dtype_name(slots[key].dtype) for name, (slots, key) in _unsaved_buffers(model).items()
            },
            recipe=record.get("recipe"),
            report=record.get("report"),
            golden=golden,
        )
        write(new, manifest)
    return target


def _own(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, and alone in its memory (safetensors refuses to write views)."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _describe(module: CompressedModule) -> dict[str, Any]:
    name = type(module).__name__
    layer = LAYERS.get(name)
    if layer is None or type(module) is not layer.cls:
        raise ValueError(
            f"lissom.save: {type(module).__module__}.{name} is not a layer that the file format knows; known "
            f"are {', '.join(LAYERS)}"
        )
    return {"class": name, "args": layer.describe(module)}


def _written_by() -> dict[str, str]:
    from . import __version__

    isa = "reference" if _native.unavailable_reason() else _native.isa()
    return {"lissom": __version__, "torch": str(torch.__version__), "isa": isa, "machine": platform.machine()}


def _write_build(model: nn.Module, folder: Path) -> dict[str, Any]:
    if type(model).__name__ in LAYERS and isinstance(model, CompressedModule):
        return {"kind": "layer"}
    if "transformers" in sys.modules:
        build: dict[str, Any] | None = _huggingface().write_build(model, folder)
        if build is not None:
            return {"kind": "huggingface", **build}
    return {"kind": "user", "class": f"{type(model).__module__}.{type(model).__qualname__}"}


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check_target(target: Path, overwrite: bool) -> None:
    """Raise what :func:`save` would for a folder that it must not write to, before any work is done.

    FileExistsError, NotADirectoryError or PermissionError; nothing is written.
    """
    for parent in target.parents:
        if parent.exists():
            if not parent.is_dir():
                raise NotADirectoryError(f"lissom.save: {parent} is a file, so {target} cannot be a folder")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise PermissionError(f"lissom.save: {parent} is read-only; choose another folder")
            break
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"lissom.save: {target} is a file; give a folder")
    present = {path.name for path in target.iterdir()}
    if not present:
        return
    foreign = sorted(present - _own_files(target))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise FileExistsError(
            f"lissom.save: {target} holds {', '.join(foreign[:3])}{more}, which lissom did not write; give a "
            "new or empty folder"
        )
    if not overwrite:
        raise FileExistsError(f"lissom.save: {target} holds a saved model; pass overwrite=True to replace it")


def _own_files(folder: Path) -> set[str]:
    """Names of the files that an earlier save wrote; empty where its manifest cannot be read."""
    try:
        return {MANIFEST, *read(folder).files}
    except FormatError:
        return set()


def _check_extras(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    extras = [Path(p) for p in paths]
    for path in extras:
        if not path.is_file():
            raise FileNotFoundError(f"lissom.save: extra_files: {path} is not a file")
        if path.name in (WEIGHTS, MANIFEST, "config.json", "generation_config.json"):
            raise ValueError(f"lissom.save: extra_files: {path.name} is written by lissom.save itself")
    return extras


def _tensor_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any], str]]:
    """Every (full name, module, its parameter or buffer dict, key), repeated where modules are shared."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for slots in (module._parameters, module._buffers):
            for key in slots:
                if slots[key] is not None:
                    yield (f"{prefix}.{key}" if prefix else key), module, slots, key


def _state(model: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` with the live tensors; ValueError for what only pickle could save."""
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"lissom.save: {name!r} is a {type(value).__name__}, not a tensor; it could only be pickled. "
                "Return tensors from get_extra_state, or drop it"
            )
        if value.is_meta:
            raise ValueError(f"lissom.save: {name!r} is on the meta device; load its weights first")
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"lissom.save: {name!r} has layout {value.layout}; make it a dense tensor first")
        if name.startswith(RESERVED):
            raise ValueError(
                f"lissom.save: {name!r} starts with the reserved {RESERVED!r}; rename the module"
            )
    return dict(state)


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that hold the same tensor: the same object, or all the same memory seen the same way."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        key: object = id(tensor)
        if tensor.numel():
            key = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _shared_modules(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """alias → first name, for saved layers that hang in the model under more than one name."""
    first = {id(model.get_submodule(name)): name for name in layers}
    return {
        name: first[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in first and first[id(module)] != name
    }


def _unsaved_buffers(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Floating buffers outside ``state_dict``, of the model's own modules (not of the compressed layers)."""
    return {
        name: (slots, key)
        for name, module, slots, key in _tensor_slots(model)
        if slots is module._buffers
        and key in module._non_persistent_buffers_set
        and not isinstance(module, CompressedModule)
        and slots[key].dtype in FLOATS
    }


@dataclass(frozen=True)
class _Saved:
    """A folder that was read and found sound by itself. ``layers`` are still on the meta device."""

    folder: Path
    manifest: Manifest
    state: dict[str, Tensor]
    layers: dict[str, CompressedModule]
    golden: tuple[Call, list[Tensor]] | None


def load(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    check: bool = True,
) -> nn.Module:
    """Read a folder that :func:`save` wrote.

    Args:
        folder: the folder.
        model: None for a Hugging Face model, which is rebuilt from its saved config, and for a single layer.
            For any other module a fresh one of the class that was saved: its layers are replaced by the
            saved ones, its state is loaded, and it is returned. On any error it is left as it was.
        device: where the model goes.
        check: run the golden input, if there is one, and compare with the saved output.

    Returns:
        The model, with its train/eval mode, ``requires_grad`` flags, dtypes and ties as they were saved. The
        random state is not touched.

    Raises:
        FormatError: the folder is truncated, altered, foreign, from a newer version, or does not fit
            ``model``.
        ImportError: it holds a Hugging Face model and transformers is not installed.
    """
    torch.empty(0, device=device)  # raises for a device that is not there, before anything is done
    saved = _read(Path(folder).resolve())
    built = _skeleton(saved, model)
    with _undone_on_error(built) as patch, torch.random.fork_rng(devices=[]):
        _put(saved, built, patch)
        built.to(device)
        if check and saved.golden is not None:
            _golden.check(saved.folder, built, *saved.golden)
    if saved.manifest.report is not None:
        example_inputs = None if saved.golden is None else saved.golden[0].value
        record = {"recipe": saved.manifest.recipe, "report": saved.manifest.report}
        set_record(built, {**record, "example_inputs": example_inputs})
    return built


def inspect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a saved folder holds, checked like ``load`` does but without building the model.

    Returns:
        ``lissom.json`` as a dict, and ``folder``, ``total_bytes``, ``parameters`` (numbers in the state: a
        quantized weight as what it stands for, of a sparse one what is stored), each layer's ``bytes``.
    """
    saved = _read(Path(folder).resolve())
    layers = {}
    numbers = {id(t): t.numel() for t in saved.state.values()}
    for name, layer in saved.layers.items():
        tensors = {key: saved.state[f"{name}.{key}" if name else key] for key in layer.state_dict()}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        layers[name] = {**saved.manifest.layers[name], "bytes": size}
        numbers |= {id(tensors[key]): 0 for key in layer._dtypes}
        stored = tensors[next(iter(layer._dtypes))]
        numbers[id(stored)] = (
            stored.numel() if isinstance(layer, SparseLinear) else math.prod(weight_shape(layer))
        )
    return {
        "folder": str(saved.folder),
        "total_bytes": sum(entry["bytes"] for entry in saved.manifest.files.values()),
        "parameters": sum(numbers.values()),
        **{name: value for name, value in vars(saved.manifest).items() if name not in ("layers", "golden")},
        "golden": saved.golden is not None,
        "layers": layers,
    }


def _read(folder: Path) -> _Saved:
    """Read and check all that can be checked without the model."""
    _atomic.recover(folder)
    manifest = read(folder)
    _check_files(folder, manifest)
    tensors = _read_tensors(folder / WEIGHTS)
    golden = _golden.parse(folder, manifest.golden, tensors)
    state = {name: t for name, t in tensors.items() if not name.startswith(RESERVED)}
    for first, *others in manifest.tied:
        taken = [name for name in others if name in state]
        if first not in state or taken:
            raise altered(
                folder / MANIFEST, f"tied {short([first, *others])} does not fit the names in {WEIGHTS}"
            )
        state |= dict.fromkeys(others, state[first])
    layers = {name: _make_layer(folder, name, entry) for name, entry in manifest.layers.items()}
    for name, layer in layers.items():
        _check_layer(folder, name, layer, state)
    for alias, name in manifest.shared_modules.items():
        if name not in layers or alias in layers:
            raise altered(folder / MANIFEST, f"shared_modules[{short(alias)}]={short(name)} is no layer")
    try:
        if manifest.recipe is not None:
            recipe_from_dict(manifest.recipe)
        if manifest.report is not None:
            Report.from_dict(manifest.report)
    except (TypeError, ValueError, AttributeError) as error:
        raise altered(folder / MANIFEST, f"recipe or report: {error}") from error
    return _Saved(folder, manifest, state, layers, golden)


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FormatError(f"{path}: the file is missing; copy the whole folder again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "altered"
            raise FormatError(
                f"{path}: {size} bytes, but {MANIFEST} says {entry['bytes']}; it was {what}, copy it again"
            )
        found = _fingerprint(path)["sha256"]
        if found != entry["sha256"]:
            raise FormatError(
                f"{path}: its sha256 is {found[:12]}…, but {MANIFEST} says {entry['sha256'][:12]!r}…; it was "
                "altered, copy it again"
            )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Clones, because what safe_open gives are views of the mapped file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no Mapping)
    except (SafetensorError, AttributeError, ValueError) as error:
        raise FormatError(f"{path}: not a valid safetensors file ({error}); copy it again") from error


def _make_layer(folder: Path, name: str, entry: dict[str, Any]) -> CompressedModule:
    """The layer of one entry of ``layers``, on the meta device."""
    path, where = folder / MANIFEST, f"layers[{short(name)}]"
    known = LAYERS.get(str(entry.get("class")))
    if known is None or set(entry) != {"class", "args"}:
        raise FormatError(
            f"{path}: {where}: class {short(entry.get('class'))} is unknown; known are {', '.join(LAYERS)}. "
            "Upgrade with pip install -U lissom, or the file was altered"
        )
    args = dict(entry["args"])
    if set(args) != set(known.check):
        differ = sorted(set(args) ^ set(known.check))
        raise altered(path, f"{where}: argument {short(differ[0])} is missing or unknown")
    for key, value in args.items():
        if not known.check[key](value):
            raise altered(path, f"{where}: {key}={short(value)} is not valid")
    padding, rows = args.get("padding_idx"), args.get("num_embeddings")
    if padding is not None and padding >= rows:
        raise altered(path, f"{where}: padding_idx={padding} is out of range for {rows} rows")
    dtypes = {key: dtype_of(value) for key, value in args.items() if key.endswith("dtype")}
    try:
        return known.cls(**{**args, **dtypes}, device="meta")
    except (TypeError, ValueError, RuntimeError) as error:
        raise altered(path, f"{where}: {error}") from error


def _check_layer(folder: Path, name: str, layer: CompressedModule, state: Mapping[str, Tensor]) -> None:
    """FormatError unless the layer's tensors are there, of the right shape and dtype, and in range."""
    path, tensors = folder / WEIGHTS, {}
    for key, meta in layer.state_dict().items():
        full = f"{name}.{key}" if name else key
        tensor = state.get(full)
        if tensor is None:
            raise altered(path, f"the tensor {full!r} is missing")
        exact = layer._dtypes.get(key)
        if tensor.shape != meta.shape or (tensor.dtype != exact if exact else tensor.dtype not in FLOATS):
            says = f"{MANIFEST} says {dtype_name(exact or meta.dtype)} {list(meta.shape)}"
            raise altered(path, f"{full!r} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, but {says}")
        tensors[key] = tensor
    fault = LAYERS[type(layer).__name__].fault(name, layer, tensors)
    if fault:
        raise altered(path, fault)


def _skeleton(saved: _Saved, model: nn.Module | None) -> nn.Module:
    """The module that the saved state goes into."""
    build, path = saved.manifest.build, saved.folder / MANIFEST
    kind = build.get("kind")
    if kind == "layer":
        if set(saved.layers) != {""}:
            raise altered(path, "build.kind='layer' needs one layer named ''")
        return saved.layers[""]
    if "" in saved.layers or kind not in ("huggingface", "user"):
        raise altered(path, f"build.kind={short(kind)} is not valid here")
    if model is not None:
        return model
    if kind == "huggingface":
        built: nn.Module = _huggingface().build(saved.folder, build)
        return built
    raise FormatError(
        f"{saved.folder}: was saved from a {build.get('class')}, whose code is not in the file; give a fresh "
        f"one: lissom.load({str(saved.folder)!r}, model=...)"
    )


def _huggingface() -> ModuleType:
    """Imported only for a model that needs it: transformers takes seconds."""
    return importlib.import_module("lissom.integrations.transformers")


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[Patch]:
    """Put ``model`` back as it was if the block raises: modules (by the yielded patch), tensors, modes."""
    patch = Patch()
    before = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in model.modules()]
    try:
        yield patch
    except BaseException:
        patch.revert()
        for module, parameters, buffers, training in before:
            for slots, old in ((module._parameters, parameters), (module._buffers, buffers)):
                slots.clear()
                slots.update(old)  # type: ignore[arg-type]
            module.training = training
        raise


def _put(saved: _Saved, model: nn.Module, patch: Patch) -> None:
    """Replace layers and tensors of ``model`` by the saved ones. No existing tensor is written to."""
    table: dict[nn.Module, nn.Module] = {}
    for name in (*saved.layers, *saved.manifest.shared_modules):
        layer = saved.layers[saved.manifest.shared_modules.get(name, name)]
        if name:
            table[_replaceable(saved, model, name, layer)] = layer
    for name, act_fn in saved.manifest.fused.items():
        table[_fusable(saved, model, name, act_fn)] = FusedActivation(act_fn)
    patch.replace_modules(model, table)
    patch.apply()
    _check_state(saved, model)
    model.load_state_dict(saved.state, strict=True, assign=True)
    _restore_ties(saved, model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name not in saved.manifest.frozen)
    training = saved.manifest.training
    for name, module in model.named_modules():
        module.training = training.get(name, training.get("", False))
    for name, (slots, key) in _unsaved_buffers(model).items():
        if name in saved.manifest.buffer_dtypes:
            slots[key] = slots[key].to(dtype_of(saved.manifest.buffer_dtypes[name]))
    for name, _, slots, key in _tensor_slots(model):
        if slots[key].is_meta:
            raise FormatError(
                f"{saved.folder}: {name!r} is on the meta device and not in the file; give a model made on "
                "the CPU"
            )


def _fusable(saved: _Saved, model: nn.Module, name: str, act_fn: str) -> nn.Module:
    """The activation module of ``model`` that a linear computes; FormatError where it is another."""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        old = None
    if old is None or recognise(old) != act_fn:
        found = "does not exist" if old is None else f"is {old!r}"
        raise FormatError(
            f"{saved.folder}: {name!r} was saved as a {act_fn} that the linear before it computes, but in "
            f"the given {type(model).__name__} it {found}; give one like the one that was saved"
        )
    return old


def _replaceable(saved: _Saved, model: nn.Module, name: str, layer: CompressedModule) -> nn.Module:
    """The module of ``model`` whose place ``layer`` takes; FormatError where it is not one like it."""
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise FormatError(
            f"{saved.folder}: the saved layer {name!r} does not exist in the given {type(model).__name__}; "
            f"give a fresh {saved.manifest.build.get('class')}"
        ) from error
    biases = [getattr(module, "bias", None) is not None for module in (old, layer)]
    if kind_of(old) != kind_of(layer) or weight_shape(old) != weight_shape(layer) or biases[0] != biases[1]:
        raise FormatError(
            f"{saved.folder}: {name!r} was saved as {type(layer).__name__}({layer.extra_repr()}), but the "
            f"model has {type(old).__name__}({old.extra_repr()}) there; give one like the one that was saved"
        )
    return old


def _check_state(saved: _Saved, model: nn.Module) -> None:
    """FormatError unless the names, shapes and kinds of dtype of the saved state are those of ``model``."""
    expected = model.state_dict(keep_vars=True)
    fix = f"give a fresh {saved.manifest.build.get('class')} made like the one that was saved"
    for what, names in (
        ("is missing in the file", expected.keys() - saved.state.keys()),
        ("is in the file but not in the model", saved.state.keys() - expected.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise FormatError(f"{saved.folder / WEIGHTS}: {min(names)!r}{more} {what}; {fix}")
    for name, tensor in saved.state.items():
        old = expected[name]
        both_float = tensor.dtype in FLOATS and old.dtype in FLOATS
        if tensor.shape != old.shape or not (both_float or tensor.dtype == old.dtype):
            raise FormatError(
                f"{saved.folder / WEIGHTS}: {name!r} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, but "
                f"the model has {dtype_name(old.dtype)} {list(old.shape)}; {fix}"
            )


def _restore_ties(saved: _Saved, model: nn.Module) -> None:
    slots = {name: (holder, key) for name, _, holder, key in _tensor_slots(model)}
    for first, *others in saved.manifest.tied:
        if first in slots:
            tensor = slots[first][0][slots[first][1]]
            for name in others:
                if name in slots:
                    holder, key = slots[name]
                    holder[key] = tensor
    unknown = set(saved.manifest.frozen) - slots.keys()
    if unknown:
        raise altered(saved.folder / MANIFEST, f"frozen: {short(min(unknown))} is no parameter")
