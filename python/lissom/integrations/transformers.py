"""Hugging Face models: how ``lissom.save`` writes their config, and how ``lissom.load`` rebuilds them.

A saved folder is untrusted: the class is looked up among transformers' own ``PreTrainedModel`` classes, and
code that a config points to (``auto_map``) is never loaded.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .._manifest import MANIFEST, FormatError, altered, short
from ..nn._compressed import CompressedModule

try:
    import transformers
except ImportError as error:
    raise ImportError("Hugging Face models need transformers: pip install 'lissom[demo]'") from error

__all__ = ["build", "load_pretrained", "load_tokenizer", "text_inputs", "tokenizer_files", "write_build"]

CONFIG = "config.json"
GENERATION = "generation_config.json"
_ATTENTION = ("eager", "sdpa")


def write_build(model: nn.Module, folder: Path) -> dict[str, Any] | None:
    """Write the config files and return what :func:`build` needs.

    None for what :func:`build` could not make again: a class that is not transformers' own, or a model that
    got more modules than its config says.
    """
    name = type(model).__name__
    own = getattr(transformers, name, None) is type(model)
    if not own or not isinstance(model, transformers.PreTrainedModel):
        return None
    config: dict[str, Any] = json.loads(json.dumps(model.config.to_dict(), default=str))
    config.pop("_name_or_path", None)  # a path of the machine that saved it
    names = dict(model.named_modules()).keys()
    rebuilt = dict(_construct(type(model), config, None).named_modules()).keys()
    if names - rebuilt:
        return None
    absent = sorted(n for n in rebuilt - names if n.rpartition(".")[0] in names)
    config["architectures"] = [name]
    if any(isinstance(module, CompressedModule) for module in model.modules()):
        # from_pretrained would fill in random weights with a mere warning. It does so even for a quant_method
        # that it does not know, but refuses one that is missing.
        config["quantization_config"] = {"how to load": "lissom.load(folder)"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if model.can_generate() and generation is not None:
        (folder / GENERATION).write_text(generation.to_json_string(use_diff=False) + "\n", encoding="utf-8")
    attention = getattr(model.config, "_attn_implementation", None)
    return {"class": name, "attention": attention, "absent": absent}


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
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = _construct(cls, config, entry.get("attention"))
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
            model.get_submodule(str(slot))
            setattr(model.get_submodule(parent), key, None)
        except AttributeError as error:
            raise altered(where, f"build.absent: {short(slot)} is no module of {name}") from error
    if (folder / GENERATION).is_file() and cls.can_generate():
        generation: Any = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        model.generation_config = generation
    return model


def _construct(cls: Any, config: dict[str, Any], attention: object) -> nn.Module:
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    made = cls.config_class.from_dict(plain)
    if attention in _ATTENTION:
        made._attn_implementation = attention
    with _parameters_on_meta():
        model: nn.Module = cls(made)
    return model


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


def load_pretrained(name: str, *, offline: bool = False) -> nn.Module:
    """A model from a folder or hub id, of the class that its config names, in eval mode.

    Raises:
        OSError, ValueError: it cannot be found or read.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = offline or Path(name).is_dir()
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    cls: Any = getattr(transformers, architecture, None) or transformers.AutoModel
    model: nn.Module = cls.from_pretrained(name, local_files_only=local)
    return model.eval()


def load_tokenizer(name: str, *, offline: bool = False) -> Any:
    """The tokenizer of a folder or hub id, able to pad; None where there is none that knows English words."""
    local = offline or Path(name).is_dir()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, KeyError):
        return None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Without its files transformers may make a tokenizer all the same, one that knows no words.
    ids = tokenizer("the house is old", add_special_tokens=False)["input_ids"]
    usable = tokenizer.pad_token is not None and any(i != tokenizer.unk_token_id for i in ids)
    return tokenizer if usable else None


def tokenizer_files(tokenizer: Any, folder: Path) -> list[Path]:
    """Write the tokenizer into ``folder``; the files."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return sorted(path for path in folder.iterdir() if path.is_file())


def text_inputs(tokenizer: Any, texts: Sequence[str], rows: int, length: int) -> dict[str, torch.Tensor]:
    """``rows`` × ``length`` tokens of running text, as keyword arguments for the model."""
    ids = tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]
    starts = [i * len(ids) // rows for i in range(rows)]
    endless = ids * (1 + -(-2 * length // len(ids)))
    passages = [tokenizer.decode(endless[start : start + 2 * length]) for start in starts]
    batch = tokenizer(passages, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
    return dict(batch)
