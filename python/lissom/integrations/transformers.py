"""Hugging Face models: how ``lissom.save`` writes their config, how ``lissom.load`` rebuilds them, and
distillation in their Trainer.

A saved folder is untrusted: the class is looked up among transformers' own ``PreTrainedModel`` classes, and
code that a config points to (``auto_map``) is never loaded.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .._manifest import MANIFEST, FormatError, altered, short
from ..nn import DistillationLoss
from ..nn._compressed import CompressedModule

try:
    import transformers
except ImportError as error:
    raise ImportError("Hugging Face models need transformers: pip install 'lissom[demo]'") from error

__all__ = [
    "build",
    "distillation_compute_loss",
    "load_pretrained",
    "load_tokenizer",
    "text_inputs",
    "tokenizer_files",
    "write_build",
]

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


def distillation_compute_loss(
    teacher: nn.Module, *, shift_labels: bool | None = None, **options: Any
) -> Callable[..., Any]:
    """A ``compute_loss`` that makes any of transformers' trainers distil ``teacher`` into its model::

        class Distilling(Trainer):
            compute_loss = distillation_compute_loss(teacher, temperature=2.0, ce_weight=0.5)

    Both give ``.logits`` of one shape, for the same tokens: causal and masked language models, classifiers
    of sequences and of tokens, encoder-decoders. Rows that count are those with a label other than
    ``ignore_index``; without labels in the batch, those that its ``attention_mask`` leaves.

    Args:
        teacher: put into eval mode, run without gradients on the batch's inputs as far as its ``forward``
            names them, and moved to the student's device where it is not there.
        shift_labels: whether the labels are the input's own tokens; None looks at the model: so it is for
            causal language models.
        options: of :class:`lissom.nn.DistillationLoss` but ``reduction``: the loss is a mean over the rows
            that count, over all of a step's batches where the trainer counts them (``num_items_in_batch``).
            The trainer's own ``label_smoothing_factor`` is not used; give ``label_smoothing``.

    Returns:
        ``compute_loss(trainer, model, inputs, return_outputs=False, num_items_in_batch=None)``; the trainer
        is asked only for how many processes share a step, and may be None in a loop of one's own.

    Raises:
        TypeError, ValueError: an unknown option, or one without a meaning.
    """
    if "reduction" in options:
        raise ValueError(
            f"distillation_compute_loss: reduction={options['reduction']!r} cannot be chosen: the trainer's "
            "gradient accumulation needs the mean over the rows that count; leave it out"
        )
    # Made now, so that a wrong option is found before the training starts.
    losses = {
        (shift, reduction): DistillationLoss(shift_labels=shift, reduction=reduction, **options)
        for shift in (False, True)
        for reduction in ("batchmean", "sum")
    }

    def compute_loss(
        trainer: Any,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        plain = _unwrapped(model)
        labels = inputs.get("labels")
        given = dict(inputs)
        if not _is_encoder_decoder(plain):  # which make their decoder's inputs of the labels
            given.pop("labels", None)
        outputs = model(**given)
        logits = outputs.logits
        if next(teacher.parameters(), logits).device != logits.device:
            teacher.to(logits.device)
        with torch.no_grad():
            others = teacher.eval()(**_named_by(teacher, given)).logits
        shift = _is_causal(plain) if shift_labels is None else shift_labels
        mask = inputs.get("attention_mask") if labels is None else None
        if mask is not None and mask.shape != logits.shape[:-1]:
            mask = None  # of tokens, where the logits are of sequences
        loss: torch.Tensor
        if num_items_in_batch is None:
            loss = losses[shift, "batchmean"](logits, others, labels, mask)
        else:
            count = torch.as_tensor(num_items_in_batch, device=logits.device).sum()
            loss = losses[shift, "sum"](logits, others, labels, mask) / count
            loss = loss * _processes(trainer)
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DataParallel and its relatives
        model = inner
    return model


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if _is_encoder_decoder(model):
        return False
    name = type(model).__name__
    return name in NAMES.values() or getattr(model, "loss_type", None) == "ForCausalLM"


def _named_by(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``inputs`` that ``model.forward`` names; all where it names none."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return {name: value for name, value in inputs.items() if name in names} if names else inputs


def _processes(trainer: Any) -> int:
    """Gradients are averaged over the processes, where ``num_items_in_batch`` counts those of all."""
    arguments = getattr(trainer, "args", None)
    if getattr(arguments, "n_gpu", 1) > 1 or not getattr(arguments, "average_tokens_across_devices", False):
        return 1
    together = getattr(trainer, "get_tp_size", lambda: 1)()
    return max(1, int(trainer.accelerator.num_processes) // int(together))
