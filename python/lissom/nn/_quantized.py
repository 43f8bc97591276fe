"""What all quantized layers share: buffers that keep their dtype, and a cache of the packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["QuantizedModule"]


class QuantizedModule(nn.Module):
    """Base of the quantized layers.

    ``state_dict`` holds the canonical tensors only. ``_dtypes`` names the buffers whose dtype is part of the
    format; ``.half()`` and the like leave them alone. ``_like`` is an empty tensor that follows the
    module's floating dtype, so that ``weight`` can be dequantized to the dtype a plain layer would have.
    """

    _dtypes: ClassVar[dict[str, torch.dtype]] = {}

    def __init__(self, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._like: Tensor
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    def _repack(self) -> None:
        """Rebuild what is derived from the canonical tensors for the device they are on."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        before = {name: self._buffers.get(name) for name in self._dtypes}
        super()._apply(fn, recurse)
        moved = False
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is None or new is None:
                continue
            moved = moved or new.device != old.device
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        if moved:
            self._repack()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        for name, dtype in self._dtypes.items():
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.dtype != dtype:
                error_msgs.append(
                    f"{prefix}{name} has dtype {loaded.dtype} but must be {dtype}; it was not loaded "
                    "(was the file written by another tool?)"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        device = next(
            tensor.device for name in self._dtypes if (tensor := self._buffers.get(name)) is not None
        )
        if self._like.device != device:  # assign=True put real tensors into a module made on the meta device
            self._like = torch.empty(0, dtype=self._like.dtype, device=device)
        self._repack()
