"""``FusedActivation``: stands where an activation function stood that the linear before it now computes."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FusedActivation"]


class FusedActivation(nn.Module):
    """Returns its input: the ``act_fn`` of the compressed linear before it has been applied already.

    Args:
        act_fn: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``, what the replaced module computed.
    """

    def __init__(self, act_fn: str) -> None:
        super().__init__()
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return f"{self.act_fn!r}, computed by the linear before"
