"""Hugging Face models: how ``lissom.save`` writes their config, and how ``lissom.load`` rebuilds them.

A saved folder is untrusted: the class is looked up among transformers' own ``PreTrainedModel`` classes, and
code that a config points to (``auto_map``) is never loaded.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .._manifest import MANIFEST, FormatError, altered, short

__all__ = ["build", "write_build"]

CONFIG = "config.json"
GENERATION = "generation_config.json"
_ATTENTION = ("eager", "sdpa")


def write_build(model: nn.Module, folder: Path) -> dict[str, Any] | None:
    """Write the config files and return what :func:`build` needs; None for what is not transformers' own."""
    name = type(model).__name__
    own = getattr(transformers, name, None) is type(model)
    if not own or not isinstance(model, transformers.PreTrainedModel):
        return None
    config = model.config.to_dict()
    config["architectures"] = [name]
    config.pop("_name_or_path", None)  # a path of the machine that saved it
    # transformers cannot read the quantized tensors; this keeps from_pretrained from filling in random ones.
    config["quantization_config"] = {"quant_method": "lissom"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if model.can_generate() and generation is not None:
        (folder / GENERATION).write_text(generation.to_json_string(use_diff=False) + "\n", encoding="utf-8")
    return {
        "class": name,
        "attention": getattr(model.config, "_attn_implementation", None),
        "absent": [n for n, slot in _slots(model) if slot is None],
    }


def build(folder: Path, entry: dict[str, Any]) -> nn.Module:
    """The model of a saved folder with parameters on the meta device, to be filled.

    Buffers are made on the CPU as the constructor makes them, so that those that are not saved (position ids,
    rotary frequencies) are right. Nothing is initialised at random.
    """
    where = folder / MANIFEST
    name = entry.get("class")
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or cls.config_class is None:
        raise FormatError(
            f"{where}: build.class={short(name)} is no model of transformers {transformers.__version__}; "
            "upgrade transformers, or the file was altered"
        )
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        data.pop("quantization_config", None)
        data.pop("auto_map", None)
        config = cls.config_class.from_dict(data)
        if entry.get("attention") in _ATTENTION:
            config._attn_implementation = entry["attention"]
        with _parameters_on_meta():
            model: nn.Module = cls(config)
    except Exception as error:  # a config can be wrong in as many ways as there are models
        raise FormatError(
            f"{folder / CONFIG}: no {name} can be made from it ({type(error).__name__}: {error}); install "
            "the transformers version that saved it, or the file was altered"
        ) from error
    absent = entry.get("absent")
    if not isinstance(absent, list):
        raise altered(where, f"build.absent={short(absent)} is not a list")
    for slot in absent:
        parent, _, key = str(slot).rpartition(".")
        try:
            model.get_submodule(parent)._modules[key] = None
        except AttributeError as error:
            raise altered(where, f"build.absent: {short(slot)} is no module of {name}") from error
    if (folder / GENERATION).is_file() and cls.can_generate():
        generation: Any = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        model.generation_config = generation
    return model


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    for prefix, module in model.named_modules():
        for key, child in module._modules.items():
            yield (f"{prefix}.{key}" if prefix else key), child


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers go to the meta device; the random state stays as it is."""

    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        handle.remove()
