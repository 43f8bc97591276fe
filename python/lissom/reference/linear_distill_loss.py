"""Distillation losses from hidden states, the textbook page.

Hidden states h_s ``[R, K]`` and h_t ``[R, K']``, output layers W_s ``[V, K]``, b_s and W_t ``[V, K']``, b_t::

    s = h_s · W_sᵀ + b_s        t = h_t · W_tᵀ + b_t, or the teacher's logits or k largest as given

    loss per row and G = dL/ds ``[R, V]``: the page of ``distill_loss``

    dL/dh_s = G · W_s           dL/dW_s = Gᵀ · h_s           dL/db_s = Σ_r G_r

Rows have nothing to do with each other but for the sums of the last two, so the op goes through them some at
a time and holds the logits of those only. All in float64.

One pass over chunks with the gradients computed in the forward: Hsu et al., "Liger Kernel", 2024. The k
largest probabilities as a teacher: Kim and Rush, "Sequence-Level Knowledge Distillation", 2016.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distill_loss import DistillOptions, row_losses

__all__ = ["LinearDistillGradients", "linear_distill_loss"]


class LinearDistillGradients(NamedTuple):
    """Of the sum of all rows' losses, float64: ``[R, K]``, ``[V, K]``, ``[V]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def linear_distill_loss(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None] | Tensor | None,
    labels: Tensor | None,
    options: DistillOptions,
    *,
    topk: tuple[Tensor, Tensor] | None = None,
    term_scale: float = 1.0,
    ce_scale: float = 1.0,
    factors: Tensor | None = None,
) -> tuple[Tensor, LinearDistillGradients]:
    """Losses and the gradients of their sum.

    Args:
        student: hidden states ``[R, K]``, weight ``[V, K]``, bias ``[V]`` or None.
        teacher: the same, or its logits ``[R, V]``, or None.
        labels, options, topk, term_scale, ce_scale: as :func:`lissom.reference.distill_loss.row_losses` has
            them.
        factors: float ``[R]``: the gradients are those of Σ factors · loss.

    Returns:
        float64 ``[R]``, and the gradients.
    """
    hidden, weight, bias = student
    logits = _linear(hidden, weight, bias)
    others = _linear(*teacher) if isinstance(teacher, tuple) else teacher
    loss, grad = row_losses(
        logits, others, labels, options, topk=topk, term_scale=term_scale, ce_scale=ce_scale
    )
    if factors is not None:
        grad = grad * factors.double()[:, None]
    return loss, LinearDistillGradients(grad @ weight.double(), grad.t() @ hidden.double(), grad.sum(0))


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden.double() @ weight.double().t()
    return logits if bias is None else torch.add(logits, bias.double())
