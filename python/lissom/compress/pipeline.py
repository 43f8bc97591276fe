"""``compress_``: select → trace → fuse → smooth → calibrate → prune → measure → build → swap → compare.

Everything that can fail happens before the model is touched: new layers are built beside the old ones, then
exchanged in one reversible step. The extra memory is the compressed layers (of the float32 model about half
for int8, a quarter for int4: canonical and packed weights) and one layer's work.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .. import registry
from ..config import BlockSparse
from ..nn import FusedActivation, SparseLinear
from ..nn._compressed import CompressedModule
from . import calibrate, measure, smooth, sparsity
from .convert import COMPRESSED_TYPES, Extras, smoothed_data, weight_shape
from .fuse import Fusion, find_fusions
from .inputs import Call, as_call, as_calls, evaluating, run, trimmed
from .patch import Patch
from .recipe import Recipe, check_recipe, recipe_to_dict
from .report import LayerReport, Report, set_record
from .select import FilterFn, Layer, check_model, check_weights, find_layers, plain_config, settle_ties
from .trace import Trace, first_argument, trace

__all__ = ["Progress", "compress_"]

Progress = Callable[[str, int, int, str], None]
"""``progress(stage, done, total, name)``; ``total`` is 0 where it is not known beforehand."""

SLOW_LOOKUP = 2.0
"""An embedding may take this many times as long as before; see :func:`_veto_embeddings`."""

SHARE_OF_GAIN = 0.5
"""…or use up this share of the time that the linears gained."""


def compress_(
    model: nn.Module,
    recipe: Recipe,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress ``model`` in place.

    With ``example_inputs`` every linear is timed before and after on the input that the model really gives it
    and kept only where it got faster (unless ``prefer="size"``); of a block-sparse one that did not, the
    report says at which density it would. Embeddings are converted for their size; one
    is kept dense only where its look-up takes more than twice as long *and* that costs more than half of what
    the linears gained. Layers that the inputs never reach stay dense. Without ``example_inputs`` everything
    that can be converted is.

    Where that run also shows that a linear's output goes into an activation module (relu, gelu, silu) and
    nowhere else, the compressed linear computes it too; a ``nn.FusedActivation`` takes the module's place.

    On a GPU, too, a layer is timed as eager code calls it, launching from Python included. With few rows it
    may lose for that alone and yet be faster in a CUDA graph (``torch.compile(mode="reduce-overhead")``),
    where launching costs nothing: ``prefer="size"`` converts it all the same.

    Linears are rotated (``rotation``) unless the config says otherwise, or they share their weight with an
    embedding, whose table must keep its basis. Such a linear is stored as the table is: in int8 under
    ``Int4(embeddings="int8")``, without a codebook under ``embeddings="int4"``.

    Args:
        model: any ``nn.Module``; it is run in eval mode, and its training flags are restored.
        recipe: a config, ``lissom.Int8(...)``, ``lissom.Int4(...)`` or ``lissom.BlockSparse(...)``, or a
            mapping from module-name pattern to config or None (``fnmatch`` globs on dotted names; the first
            that matches decides).
        example_inputs: what the model is used with: a tensor, a tuple (positional) or a dict (keyword).
        calibration: an iterable of such inputs, needed for ``activation="static"``, ``smooth`` and
            ``method="wanda"``; ``example_inputs`` stands in for it. It is read once, and not at all where
            nothing needs it.
        filter_fn: ``filter_fn(module, name) -> bool`` leaves a layer alone by returning False.
        strict: a layer that the recipe chose but that stays dense is an error.
        progress: called as ``progress(stage, done, total, name)``.

    Returns:
        The :class:`Report`: each layer with what was done to it and why, sizes, times and errors.

    Raises:
        TypeError, ValueError: unusable arguments, weights or calibration data; the message names them.
        RuntimeError: the model raised on the inputs, or would raise after the swap.
        torch.OutOfMemoryError: a GPU has no room for the model, its inputs and one layer's work.
        In every case the model is as it was.
    """
    started = time.perf_counter()
    model = check_model(model)
    patterns = check_recipe(recipe)
    example = None if example_inputs is None else as_call(example_inputs)
    tell = progress or (lambda stage, done, total, name: None)

    tell("select", 0, 1, "")
    layers = find_layers(model, patterns, filter_fn)
    check_weights(layers)
    tell("select", 1, 1, "")

    report = Report(
        threads=torch.get_num_threads(), device=_gpu_names(model), bytes_before=measure.state_bytes(model)
    )
    try:
        with evaluating(model) as training:
            golden = None if example is None else trimmed(model, example).value
            small = None if example is None else as_call(golden)
            _Conversion(model, layers, training, example, small, calibration, strict, tell, report).run()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"compress_: {error}; the model was left unchanged. Give smaller example_inputs and calibration "
            "batches, free memory, or compress the model on the CPU and move it to the GPU afterwards"
        ) from error
    report.bytes_after = measure.state_bytes(model)
    report.seconds = time.perf_counter() - started
    record = {"recipe": recipe_to_dict(recipe), "report": report.to_dict(), "example_inputs": golden}
    set_record(model, record)
    return report


class _Conversion:
    """The stages after selection, in order; ``run`` is the table of contents."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        training: dict[nn.Module, bool],
        example: Call | None,
        small: Call | None,
        calibration: Iterable[Any] | None,
        strict: bool,
        tell: Progress,
        report: Report,
    ) -> None:
        self.model = model
        self.layers = layers
        self.training = training
        self.example = example
        self.small = small
        self.calibration = calibration
        self.strict = strict
        self.tell = tell
        self.report = report
        self.groups: list[smooth.Group] = []
        self.fusions: list[Fusion] = []

    def run(self) -> None:
        batches = self._batches()
        traced = self._trace(batches)
        if traced is not None:
            self._fuse()
            self._smooth(traced, batches)
        self._calibrate(batches)
        self._prune()
        self._measure()
        self._decide()
        if self.strict:
            _require_all(self.layers)
        self._build()
        self._swap()

    @property
    def active(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.active]

    def _needs(self, stage: str) -> list[str]:
        """Names of the linears whose config needs this stage."""
        linears = [layer for layer in self.active if layer.kind == "linear"]
        if stage == "calibrate":
            return [layer.name for layer in linears if layer.static or layer.wanda]
        return [layer.name for layer in linears if layer.smooth is not None]

    def _batches(self) -> Iterable[Call]:
        """Calibration data for the stages that need it; a list where more than one stage reads it."""
        observed, smoothed = self._needs("calibrate"), self._needs("smooth")
        if not observed and not smoothed:
            return []
        if self.calibration is None:
            if self.example is None:
                option, name = "smooth", (observed or smoothed)[0]
                if observed:
                    wanda = any(layer.wanda for layer in self.active if layer.name == name)
                    option = "method='wanda'" if wanda else "activation='static'"
                raise ValueError(
                    f"{option} (layer {name!r}) needs sample data; give calibration=[...] "
                    "or example_inputs=..."
                )
            return [self.example]
        calls = as_calls(self.calibration)
        if observed and smoothed:
            calls = iter(list(calls))
        first = next(calls, None)
        if first is None:
            raise ValueError(
                "calibration yielded no batches (is it a generator that was used before?); give it anew"
            )
        rest = itertools.chain([first], calls)
        return list(rest) if smoothed else rest

    def _trace(self, batches: Iterable[Call]) -> Trace | None:
        """Run once: layers not reached, or read directly, are left alone."""
        smoothed = bool(self._needs("smooth"))
        call, what = self.example, "example_inputs"
        if call is None:
            if not smoothed or not isinstance(batches, list):
                return None
            call, what = batches[0], "calibration batch 0"
        self.tell("trace", 0, 1, "")
        norms = [module for module in self.model.modules() if smooth.is_norm(module)] if smoothed else []
        traced = trace(self.model, call, self.layers, norms, what)
        for layer, rows in traced.rows.items():
            layer.rows = rows
        for layer in self.active:
            if layer in traced.read_directly:
                layer.leave(
                    "skipped", f"its weight is read directly ({traced.read_directly[layer]}), not only called"
                )
            elif layer not in traced.calls and self.example is not None:
                if any(other in traced.calls for other in layer.tied):
                    continue  # nobody reads it: it goes the way of the layers that it is tied to
                reason = "example_inputs do not reach it"
                if layer in traced.parents_ran:
                    reason = "its parent ran without calling it: its weight is read directly, or " + reason
                layer.leave("kept dense", reason)
        settle_ties(self.layers)
        self.tell("trace", 1, 1, "")
        return traced

    def _fuse(self) -> None:
        """Find the activation modules that compressed linears can take over."""
        if self.small is None:
            return
        # A few rows show as much, and the outputs that are held meanwhile stay small.
        self.fusions = find_fusions(self.model, self.small, self.active, "example_inputs")
        for fusion in self.fusions:
            for layer in fusion.layers:
                layer.activation, layer.act_fn = fusion.module, fusion.act_fn

    def _smooth(self, traced: Trace, batches: Iterable[Call]) -> None:
        if not self._needs("smooth"):
            return
        self.groups, notes = smooth.find_groups(self.model, self.layers, traced)
        self.report.notes += notes
        if self.groups:
            smooth.fit(self.model, self.groups, batches, self._ticker("smooth", batches))

    def _calibrate(self, batches: Iterable[Call]) -> None:
        if self._needs("calibrate"):
            calibrate.calibrate(self.model, self.active, batches, self._ticker("calibrate", batches))
            settle_ties(self.layers)

    def _prune(self) -> None:
        """Decide block shapes, and which blocks are kept of layers that compete with one another."""
        pools: dict[BlockSparse, list[Layer]] = {}
        for layer in self.active:
            if layer.sparse is not None:
                pools.setdefault(layer.sparse, []).append(layer)
        todo = [layer for pool in pools.values() for layer in pool]
        for done, layer in enumerate(todo, start=1):
            sparsity.decide_block_shapes([layer])
            self.tell("prune", done, len(todo), layer.name)
        for config, pool in pools.items():
            if config.scope == "global":
                sparsity.keep_together(pool)

    def _ticker(self, stage: str, batches: Iterable[Call]) -> Callable[[int], None]:
        total = len(batches) if isinstance(batches, list) else _length(self.calibration)
        return lambda done: self.tell(stage, done, total, "")

    def _measure(self) -> None:
        """One run of the example inputs, in which every layer is held to the one that would replace it.

        The new layers are dropped again: kept, they would break up the memory that the run's activations use.
        Where choosing the weights takes long they are kept, without their packed copies.
        """
        if self.example is None:
            return
        todo = self.active
        timings: dict[object, measure.PairedTiming] = {}
        done: set[Layer] = set()
        with ExitStack() as stack:
            for layer in todo:

                def measure_call(
                    _: nn.Module, args: Any, kwargs: Any, output: Tensor, layer: Layer = layer
                ) -> None:
                    x = first_argument(args, kwargs)
                    if layer.active and x is not None:
                        try:
                            _measure_call(layer, x, output, list(kwargs), timings)
                        except torch.OutOfMemoryError:
                            layer.leave(
                                "kept dense", "the GPU has no room to measure it in a run of the model"
                            )
                    done.add(layer)
                    self.tell("measure", len(done), len(todo), layer.name)

                stack.callback(layer.module.register_forward_hook(measure_call, with_kwargs=True).remove)
            run(self.model, self.example, "example_inputs")
        for layer in todo:
            if not layer.timings and not any(other.timings for other in layer.tied):
                layer.leave("kept dense", "example_inputs give it no rows to work on")
        self.tell("measure", len(todo), len(todo), "")

    def _decide(self) -> None:
        """Do no harm: what is not worth it stays dense."""
        for layer in self.active:
            if layer.kind != "linear" or not layer.timings or layer.ratio < 1:
                continue
            if _prefers_speed(layer):
                layer.leave("kept dense", _why_not_faster(layer))
            elif isinstance(layer.candidate, SparseLinear):
                share = measure.module_bytes(layer.candidate, set()) / measure.module_bytes(
                    layer.module, set()
                )
                if share >= 1:
                    layer.leave(
                        "kept dense",
                        f"neither smaller ({share:.2f}× the bytes at density {layer.candidate.density:.2f}) "
                        f"nor faster ({1 / layer.ratio:.2f}× the dense speed at M={layer.m})",
                    )
        settle_ties(self.layers)
        _veto_embeddings(self.active)
        settle_ties(self.layers)
        for fusion in self.fusions:
            if not fusion.active:  # a linear that stays dense still needs the module
                for layer in fusion.layers:
                    layer.activation = layer.act_fn = layer.candidate = None

    def _build(self) -> None:
        """Quantize every layer that is to be exchanged."""
        todo = self.active
        for done, layer in enumerate(todo, start=1):
            layer.candidate = _candidate(layer)
            self.tell("quantize", done, len(todo), layer.name)

    def _swap(self) -> None:
        """Exchange the layers, run the whole model both ways, and take everything back should that fail."""
        patch = self._patch()
        converted = self.active
        rows = _layer_reports(self.layers)
        if self.example is None or not converted:
            patch.apply()
            self.report.layers = rows
            return
        example, model, what = self.example, self.model, "example_inputs"
        self.tell("compare", 0, 1, "")
        try:
            before = run(model, example, what)
            patch.apply()
            after = run(model, example, f"{what}, with compressed layers", "leave the failing layers out")
            agreement = measure.compare_outputs(before, after)
            del before, after
            timing = measure.time_pair(
                lambda: example(model),
                lambda: example(model),
                prepare_before=patch.revert,
                prepare_after=patch.apply,
                devices=_devices(model),
                budget_s=0.5,
                warmup=0,
                min_rounds=3,
                max_rounds=21,
            )
            patch.apply()
        except BaseException:
            patch.revert()
            raise
        report = self.report
        report.layers = rows
        report.cosine, report.max_abs_error = agreement.cosine, agreement.max_abs_error
        report.latency_before_ms, report.latency_after_ms = timing.before_us / 1e3, timing.after_us / 1e3
        report.latency_ratio = timing.ratio
        if timing.ratio >= 1 and any(_prefers_speed(layer) for layer in converted):
            report.notes.append(
                f"the model as a whole did not get faster ({1 / timing.ratio:.2f}×), whatever its layers "
                "did; if other programs kept the machine busy, compress it again when it is idle"
            )
        if agreement.cosine is None:
            report.notes.append(
                "the model's outputs could not be compared (no finite floating-point tensors)"
            )
        self.tell("compare", 1, 1, "")

    def _patch(self) -> Patch:
        patch = Patch()
        owners: dict[Layer, nn.Module] = {}
        table: dict[nn.Module, nn.Module] = {}
        for layer in self.active:
            if layer.candidate is None:
                raise RuntimeError(f"{layer.name}: no compressed layer was built")
            owner = next((owners[other] for other in layer.tied if other in owners), None)
            if owner is not None:
                layer.converter.share(layer.candidate, owner)
            layer.candidate.train(self.training[layer.module])
            owners[layer] = table[layer.module] = layer.candidate
        for fusion in self.fusions:
            if fusion.active:
                table[fusion.module] = FusedActivation(fusion.act_fn).train(self.training[fusion.module])
        patch.replace_modules(self.model, table)
        for group in self.groups:
            smoothing = group.layers[0].smoothing
            if smoothing is None or not any(layer.active for layer in group.layers):
                for layer in group.layers:
                    layer.smoothed_by = None
                continue
            smooth.fold(patch, group.norm, smoothing)
            for layer in group.layers:
                if not layer.active:
                    weight: Tensor = layer.module.weight  # type: ignore[assignment]
                    patch.replace_data(weight, smoothed_data(layer.module, smoothing))
        return patch


def _length(value: object) -> int:
    try:
        return len(value)  # type: ignore[arg-type]
    except TypeError:
        return 0


def _devices(model: nn.Module) -> list[torch.device]:
    tensors: Iterator[Tensor] = itertools.chain(model.parameters(), model.buffers())
    return list(dict.fromkeys(t.device for t in tensors))


def _gpu_names(model: nn.Module) -> str:
    gpus = [device for device in _devices(model) if device.type == "cuda"]
    return ", ".join(dict.fromkeys(torch.cuda.get_device_name(device) for device in gpus))


def _prefers_speed(layer: Layer) -> bool:
    return layer.config is not None and layer.config.prefer == "speed"


def _candidate(layer: Layer) -> CompressedModule:
    """The layer that would replace ``layer``: the one that was kept, or a new one."""
    if layer.candidate is not None:
        layer.candidate._repack()
        return layer.candidate
    return layer.converter.build(
        layer.module,
        layer.config,
        Extras(layer.input_scale, layer.smoothing, layer.act_fn, layer.activation_norm, layer.mask),
    )


def _set_aside(layer: Layer, candidate: CompressedModule) -> None:
    """Keep ``candidate``, if its weights were hard to find, for the next call of :func:`_candidate`."""
    if layer.converter.keep and layer.active:
        layer.candidate = candidate
        if "_packed" in candidate._buffers:
            candidate._buffers["_packed"] = None


def _measure_call(
    layer: Layer, x: Tensor, output: Tensor, keywords: list[str], timings: dict[object, measure.PairedTiming]
) -> None:
    """Hold the layer that would replace ``layer`` to one real call of it: error and time.

    Calls with the same signature (shapes, strides, dtypes, config) share one timing; of the calls of one
    layer with the same signature, the first is looked at for its error.

    Args:
        x, output: what the layer was called on and what it returned.
        keywords: names of the arguments that were passed by keyword.
        timings: what was timed before, by signature; added to.
    """
    rows = x.numel() // x.shape[-1] if layer.kind == "linear" and x.dim() and x.shape[-1] else x.numel()
    if rows == 0:
        return
    signature = (
        layer.kind,
        type(layer.module),
        weight_shape(layer.module),
        getattr(layer.module, "bias", None) is not None,
        tuple(x.shape),
        x.stride(),
        x.dtype,
        x.device,
        output.dtype,
        repr(layer.config),
        None if layer.mask is None else int(layer.mask.sum()),
        layer.act_fn,
    )
    if signature in layer.signatures:
        layer.timings.append(timings[signature])
        return
    activation = (lambda y: y) if layer.activation is None else layer.activation.forward
    output = activation(output.clone())  # a copy, because it may work in place
    candidate = _candidate(layer)
    seen_by_candidate = x if layer.smoothing is None else (x / layer.smoothing).to(x.dtype)
    named = dict.fromkeys(keywords, seen_by_candidate)
    try:
        result = candidate.forward(**named) if named else candidate.forward(seen_by_candidate)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        layer.leave("skipped", f"the compressed layer cannot serve its input: {error}")
        return
    if not bool(torch.isfinite(result).all()) and bool(torch.isfinite(output).all()):
        layer.leave("kept dense", "the compressed layer's output is not finite on example_inputs")
        return
    layer.quality = layer.quality or measure.SignalToNoise()
    layer.quality.add(output, result)
    if layer.m is None:
        layer.m = rows
    if signature not in timings:
        timings[signature] = measure.time_pair(
            lambda: activation(layer.module.forward(x)),
            lambda: candidate.forward(seen_by_candidate),
            devices=(x.device,),
        )
    layer.signatures.add(signature)
    layer.timings.append(timings[signature])
    _set_aside(layer, candidate)


def _veto_embeddings(layers: list[Layer]) -> None:
    """Keep an embedding dense where its slower look-up eats what the linears gained.

    Rule (only under ``prefer="speed"``): more than ``SLOW_LOOKUP`` times as long as before, and the extra
    time is more than ``SHARE_OF_GAIN`` of the time that all converted linears save in one run of the model.
    """
    linears = [layer for layer in layers if layer.kind == "linear"]
    gain = sum((1 - layer.ratio) * layer.before_us for layer in linears)
    for layer in layers:
        if layer.kind != "embedding" or not layer.timings or not _prefers_speed(layer):
            continue
        extra = (layer.ratio - 1) * layer.before_us
        if layer.ratio > SLOW_LOOKUP and extra > SHARE_OF_GAIN * gain:
            layer.leave(
                "kept dense",
                f"its look-up would take {layer.ratio:.1f}× as long, {extra:.0f} µs more, while the linears "
                f"gain {max(gain, 0):.0f} µs",
            )


def _require_all(layers: list[Layer]) -> None:
    """ValueError naming every layer that the recipe chose but that is not converted."""
    left = [layer for layer in layers if layer.wanted and not layer.active]
    if left:
        lines = "".join(f"\n  {layer.name}: {layer.status}: {layer.reason}" for layer in left)
        raise ValueError(
            f"strict=True, but {len(left)} of the chosen layers would stay dense (the model was left "
            f"unchanged). Leave them out by the recipe or filter_fn, or use strict=False:{lines}"
        )


def _layer_reports(layers: list[Layer]) -> list[LayerReport]:
    seen_before: set[object] = set()
    seen_after: set[object] = set()
    rows = []
    for layer in layers:
        after = layer.candidate if layer.active and layer.candidate is not None else layer.module
        row = LayerReport(
            name=layer.name,
            kind=layer.kind,
            shape=weight_shape(layer.module),
            status=layer.status or "converted",
            reason=layer.reason,
            config=plain_config(layer),
            bytes_before=measure.module_bytes(layer.module, seen_before),
            bytes_after=measure.module_bytes(after, seen_after),
            aliases=layer.aliases,
            shared_with=tuple(other.name for other in layer.tied),
            smoothed_by=layer.smoothed_by,
            input_scale=layer.input_scale if layer.active else None,
            act_fn=layer.act_fn if layer.active else None,
        )
        if layer.timings:
            row.m, row.calls = layer.m, len(layer.timings)
            row.ratio = layer.ratio
            row.time_before_us = layer.before_us
            row.time_after_us = sum(t.after_us for t in layer.timings)
        if layer.quality is not None:
            row.sqnr_db = layer.quality.db
        if layer.active:
            row.reason = _why_converted(layer)
            served = serving_backend(after)
            row.backend, row.isa = served
        rows.append(row)
    return rows


def _why_not_faster(layer: Layer) -> str:
    text = f"not faster: {1 / layer.ratio:.2f}× the dense speed at M={layer.m}"
    if not isinstance(layer.candidate, SparseLinear):
        return text
    density = layer.candidate.density
    wins = sparsity.winning_density(layer, density)
    rows, columns = layer.candidate.block_shape
    would = f"{rows}×{columns} blocks would not win at any density"
    if wins is not None:
        would = f"it would win below density ≈ {wins:.2f}"
    return f"{text} and density {density:.2f}; {would}"


def _why_converted(layer: Layer) -> str:
    stored = f", {describe_blocks(layer.candidate)}" if isinstance(layer.candidate, SparseLinear) else ""
    if not layer.timings:
        tied = next((other.name for other in layer.tied if other.timings), None)
        return ("not measured" if tied is None else f"tied to {tied}") + stored
    if layer.kind == "embedding":
        return "smaller"
    fused = f", {layer.act_fn} fused" if layer.act_fn else ""
    if layer.ratio < 1 and math.isfinite(layer.ratio):
        return f"{1 / layer.ratio:.2f}× as fast{stored}{fused}"
    return f"smaller (prefer='size'), {1 / layer.ratio:.2f}× the dense speed{stored}"


def describe_blocks(layer: SparseLinear) -> str:
    """Density and block shape in words."""
    height, width = layer.block_shape
    return f"density {layer.density:.2f} in {height}×{width} blocks"


def serving_backend(module: nn.Module) -> tuple[str, str]:
    """(backend, instruction set or GPU) that serves a compressed layer on its device."""
    _, op = COMPRESSED_TYPES[type(module)]
    device: torch.device = module._like.device  # type: ignore[assignment]
    backend = registry.select(op, device.type)
    return backend.name, backend.detail().removeprefix(backend.name).strip()
