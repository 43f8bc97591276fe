"""A reversible change of a model: modules and tensor contents exchanged, all or nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Patch"]


class Patch:
    """Exchanges that can be applied and reverted any number of times; nothing changes until ``apply``.

    Both sides stay in memory as long as the patch lives.
    """

    def __init__(self) -> None:
        self._slots: list[tuple[dict[str, Any], str, nn.Module, nn.Module]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []

    def replace_modules(self, model: nn.Module, table: dict[nn.Module, nn.Module]) -> None:
        """Put ``table[old]`` wherever ``old`` hangs in ``model``: as a submodule or as a plain attribute."""
        for parent in model.modules():
            for slots in (parent._modules, vars(parent)):
                for key, value in slots.items():
                    if isinstance(value, nn.Module) and value in table:
                        self._slots.append((slots, key, value, table[value]))

    def replace_data(self, tensor: Tensor, data: Tensor) -> None:
        """Exchange what ``tensor`` holds; the tensor object (and all that refer to it) stays."""
        self._tensors.append((tensor, tensor.data, data))

    def apply(self) -> None:
        """Switch to the new side."""
        for slots, key, _, new in self._slots:
            slots[key] = new
        for tensor, _, new_data in self._tensors:
            tensor.data = new_data

    def revert(self) -> None:
        """Switch to the old side."""
        for slots, key, old, _ in self._slots:
            slots[key] = old
        for tensor, old_data, _ in self._tensors:
            tensor.data = old_data
