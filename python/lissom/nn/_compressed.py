"""What all compressed layers share: buffers that keep their dtype, a cache of the packed weights, checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..reference.numerics import ACTIVATION_FUNCTIONS

__all__ = [
    "CompressedModule",
    "check_linear_options",
    "check_plain_embedding",
    "check_present",
    "unobserved",
    "version",
]

_C: Any = torch._C

_DERIVED = ("_packed", "_permutation")
"""Buffers that ``_repack`` makes of the canonical tensors."""


def unobserved(input: Tensor) -> bool:
    """Whether nothing needs to see a layer's op: no autograd, compiler, tracer, mode, transform or profiler,
    nor the dispatcher itself, which makes the numbers of a negated view.

    A linear layer may then call the kernel without torch's dispatcher, which takes 3 µs of the 8 that a small
    layer takes.
    """
    return not (
        type(input) is not Tensor
        or torch.compiler.is_compiling()
        or _C.is_grad_enabled()
        or _C._len_torch_dispatch_stack()
        or _C._is_torch_function_mode_enabled()
        or _C._get_tracing_state() is not None
        or _C._functorch.maybe_current_level() is not None
        or _C._autograd._profiler_enabled()
        or input.is_neg()
    )


def version(tensor: Tensor | None) -> int | None:
    """Goes up with every change in place; tensors made in inference mode have none."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


class CompressedModule(nn.Module):
    """Base of the compressed layers.

    ``state_dict`` holds the canonical tensors only. ``_dtypes`` names those whose dtype is part of the
    format, the one with the weight's numbers first; ``.half()`` and the like leave the buffers among them
    alone. ``_like`` is an empty tensor that follows the module's floating dtype, so that ``weight`` can be
    given in the dtype that a plain layer would have. ``_sources`` names the buffers that ``_packed`` is made
    of.
    """

    _sources: ClassVar[tuple[str, ...]] = ()
    _made_of: tuple[tuple[str, Tensor | None, int | None], ...] | None = None
    _seen_instead: tuple[int, ...] = ()

    def __init__(self, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._dtypes: dict[str, torch.dtype] = {}
        self._alternatives: dict[str, tuple[torch.dtype, ...]] = {}
        self._like: Tensor
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def _register_format(
        self, name: str, tensor: Tensor | None, alternatives: tuple[torch.dtype, ...] = ()
    ) -> None:
        """Register a buffer of the format. A state with one of the ``alternatives`` as dtype is taken too."""
        self.register_buffer(name, tensor)
        if tensor is not None:
            self._dtypes[name] = tensor.dtype
            self._alternatives[name] = alternatives

    @property
    def _stored_weight(self) -> Tensor:
        """The tensor of the format that the numbers of the weight are in; tied layers have it in common."""
        stored: Tensor = getattr(self, next(iter(self._dtypes)))
        return stored

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._sources:
            self._made_of = None

    def _repack(self) -> None:
        """Rebuild what is derived from the canonical tensors for the device they are on."""

    def _keep(self, **derived: Tensor | None) -> None:
        """Store what was made of the canonical tensors: where these have changed in place, in place as well,
        since a captured CUDA graph may read it."""
        made_of, buffers = self._made_of, self._buffers
        same = made_of is not None and all(buffers.get(name) is tensor for name, tensor, _ in made_of)
        for name, new in derived.items():
            old = buffers.get(name)
            if same and old is not None and new is not None and _alike(old, new):
                with torch.inference_mode(old.is_inference()):
                    old.copy_(new)
            else:
                buffers[name] = new
        self._seal()

    def _seal(self) -> None:
        """What is derived is that of the canonical tensors as they are now."""
        held = ((name, self._buffers.get(name)) for name in self._sources)
        self._made_of = tuple((name, tensor, version(tensor)) for name, tensor in held)

    def _derived_holds(self) -> bool:
        """Whether what was derived may be used. It is made anew where the canonical tensors were replaced by
        assignment, or changed in place. Not where others stand in for them for one call
        (``torch.func.functional_call``): then the op makes what it needs; on a CPU, where that takes long, it
        is made anew when they are met again. Not for calls that are compiled."""
        made_of, buffers = self._made_of, self._buffers
        if made_of is not None:
            changed = False
            try:
                for name, tensor, number in made_of:
                    if buffers[name] is not tensor:
                        return self._met_again()
                    # Only a tensor has a number.
                    if number is not None and tensor._version != number:  # type: ignore[union-attr]
                        changed = True
            except RuntimeError:  # a copy that was made in inference mode has no versions
                changed = True
            if not changed:
                return True
        if self._stored_weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        self._repack()
        return True

    def _met_again(self) -> bool:
        """Whether the last call, too, found these tensors in place of those that something was derived from:
        that is done now for them. On a GPU a captured graph may read what there is, and Triton serves."""
        before, self._seen_instead = self._seen_instead, tuple(id(self._buffers[n]) for n in self._sources)
        if before != self._seen_instead or not self._stored_weight.is_cpu:
            return False
        self._repack()
        return True

    def _fault(self, name: str, loaded: Mapping[str, Tensor]) -> str:
        """What is wrong with the values about to be loaded into the layer ``name``, or ``""``."""
        return ""

    def _make_room(self, loaded: Mapping[str, Tensor]) -> None:
        """Give the layer's tensors the form of those about to be loaded, which were checked."""
        for name, tensor in loaded.items():
            old = self._buffers[name]
            if old is not None and tensor.dtype != old.dtype and tensor.shape == old.shape:
                self._buffers[name] = torch.empty_like(old, dtype=tensor.dtype)
                self._dtypes[name] = tensor.dtype

    def _follow(self, weight: Tensor) -> None:
        """Take over the floating dtype and the device of ``weight``."""
        self._like = torch.empty(0, dtype=weight.dtype, device=weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedModule:
        before = {name: self._buffers.get(name) for name in self._dtypes}
        packed = self._buffers.get("_packed")
        if packed is not None and fn(self._like).device != self._like.device:
            self._buffers["_packed"] = None  # another device has its own form, if any: no memory for this one
        try:
            super()._apply(fn, recurse)
        finally:
            could_not_move = packed is not None and self._stored_weight.device == packed.device
            if could_not_move and self._buffers["_packed"] is None:
                self._buffers["_packed"] = packed
        moved = others = False
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is None or new is None:
                continue
            moved = moved or new.device != old.device
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
            others = others or self._buffers[name] is not old
        if moved:
            # Should there be no memory for the new ones, the op makes in a call what it needs.
            self._buffers |= {name: None for name in _DERIVED if name in self._buffers}
        if others:
            self._repack()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        found = {name: state_dict.get(prefix + name) for name in self._dtypes}
        loaded = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        for name, tensor in loaded.items():
            legal = dict.fromkeys((self._dtypes[name], *self._alternatives[name]))
            if tensor.dtype not in legal:
                error_msgs.append(
                    f"{prefix}{name} has dtype {tensor.dtype} but must be {' or '.join(map(str, legal))}; it "
                    "was not loaded (was the file written by another tool?)"
                )
                return
        if fault := self._fault(prefix.rstrip(".") or type(self).__name__, loaded):
            error_msgs.append(f"{fault}; nothing of this layer was loaded")
            return
        self._make_room(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)
        device = next(held.device for name in self._dtypes if (held := self._buffers.get(name)) is not None)
        if self._like.device != device:  # assign=True put real tensors into a module made on the meta device
            self._like = torch.empty(0, dtype=self._like.dtype, device=device)
        self._repack()


def check_linear_options(name: str, activation: str | None, act_fn: str | None, rotated: bool) -> None:
    """ValueError unless the options that every quantized linear has are known and fit together."""
    if act_fn is not None and act_fn not in ACTIVATION_FUNCTIONS:
        raise ValueError(f"{name}: act_fn={act_fn!r} is unknown; use one of {ACTIVATION_FUNCTIONS} or None")
    if rotated and activation is None:
        raise ValueError(f"{name}: rotated=True has no use with activation=None (weight-only)")


def check_present(where: str, weight: Tensor) -> None:
    """ValueError for a weight without data."""
    if weight.is_meta:
        raise ValueError(f"{where}: the layer is on the meta device; load its weights first")


def check_plain_embedding(where: str, embedding: nn.Embedding) -> None:
    """ValueError for an embedding that no table of constants can stand for."""
    check_present(where, embedding.weight)
    if embedding.max_norm is not None:
        raise ValueError(
            f"{where}: max_norm={embedding.max_norm} changes the table on look-up; set embedding.max_norm = "
            "None if training is over"
        )
