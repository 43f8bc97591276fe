"""Distillation losses, the textbook page.

Logits s (student) and t (teacher) ``[R, V]``; capped and scaled, at temperature T::

    z_s = cap(student_scale · s)    z_t = cap(teacher_scale · t)    cap(z) = softcap · tanh(z / softcap), or z
    a = z_s / T    b = z_t / T      p = softmax(a)    q = softmax(b)

    row loss = term_scale · T² · (kl_weight · D + entropy_weight · H(p)) + ce_scale · ce_weight · CE

    D   forward: KL(q ‖ p) = Σ q (log q − log p)        reverse: KL(p ‖ q)
        js:      β KL(q ‖ m) + (1 − β) KL(p ‖ m),       m = β q + (1 − β) p,  β = js_beta
        top-k:   Σ_k q_k (log q_k − log p[i_k])         the teacher's k largest as given, not renormalised
    H(p) = −Σ p log p
    CE  = −Σ_j y_j log softmax(z_s)_j,                  y = (1 − ε) onehot(label) + ε / V, at temperature 1

The gradient, where dz/ds is student_scale · sech²(student_scale · s / softcap), or student_scale::

    dL/ds = dz/ds · (term_scale · T · (kl_weight · dD/da + entropy_weight · dH/da)
                     + ce_scale · ce_weight · (softmax(z_s) − y))

    dD/da forward: p − q        reverse: p (log p − log q − D)      js: (1 − β) p (log(p / m) − KL(p ‖ m))
          top-k:   p Σ_k q_k − Σ_k q_k onehot(i_k)
    dH/da = −p (log p + H)

0 · log 0 is 0: a logit of −inf is masked, in one or in both. Where q > 0 meets p = 0, forward KL is +inf, as
is reverse KL where p > 0 meets q = 0; the gradients are then what the formulas give. A row with NaN, or
masked all over, is NaN. A row whose label is ``ignore_index`` counts in no term: 0, and its gradient too. A
term of weight 0 is left out, not multiplied by 0. All in float64.

T² keeps gradients at one size over temperatures: Hinton, Vinyals and Dean, "Distilling the Knowledge in a
Neural Network", 2015. Generalized JSD: Agarwal et al., "On-Policy Distillation of Language Models" (GKD),
2023. tanh cap: Gemma Team, "Gemma 2", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

__all__ = ["DIVERGENCES", "DistillOptions", "row_losses"]

DIVERGENCES = ("forward", "reverse", "js")
"""Names, in the order of ``lissom::Divergence``'s codes."""


@dataclass(frozen=True)
class DistillOptions:
    """What the formulas leave open. :func:`lissom.ops.distill_loss` describes and checks each."""

    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    entropy_weight: float = 0.0
    divergence: str = "forward"
    js_beta: float = 0.5
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    student_scale: float = 1.0
    teacher_scale: float = 1.0


def row_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    options: DistillOptions,
    *,
    topk: tuple[Tensor, Tensor] | None = None,
    term_scale: float = 1.0,
    ce_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Losses and their gradient with respect to ``student``.

    Args:
        student, teacher: ``[R, V]``, any float dtype; ``teacher`` is read where ``kl_weight`` is not 0.
        labels: integer ``[R]``, each in [0, V) or ``ignore_index``, or None.
        topk: instead of ``teacher``, log-probabilities at temperature T and indices, ``[R, k]`` each.
        term_scale, ce_scale: the reduction's factors.

    Returns:
        float64 ``[R]`` and ``[R, V]``.
    """
    o, t = options, options.temperature
    scaled = student.double() * o.student_scale
    z = _cap(scaled, o.softcap)
    loss, grad = z.new_zeros(z.shape[0]), torch.zeros_like(z)
    if o.kl_weight or o.entropy_weight:
        log_p = log_softmax(z / t, -1)
        p = log_p.exp()
        if o.kl_weight:
            if topk is not None:
                divergence, slope = _topk_divergence(log_p, p, *topk)
            else:
                assert teacher is not None
                log_q = log_softmax(_cap(teacher.double() * o.teacher_scale, o.softcap) / t, -1)
                divergence, slope = _divergence(log_p, p, log_q, o)
            loss += term_scale * t * t * o.kl_weight * divergence
            grad += term_scale * t * o.kl_weight * slope
        if o.entropy_weight:
            entropy = -_times(p, log_p).sum(-1)
            loss += term_scale * t * t * o.entropy_weight * entropy
            grad -= term_scale * t * o.entropy_weight * _times(p, log_p + entropy[:, None])
    ignored = torch.zeros_like(loss, dtype=torch.bool)
    if labels is not None:
        ignored = labels == o.ignore_index
        if o.ce_weight:
            log_p = log_softmax(z, -1)
            target = labels.long().masked_fill(ignored, 0)[:, None]
            y = torch.zeros_like(z).scatter_(-1, target, 1 - o.label_smoothing)
            y += o.label_smoothing / z.shape[-1]
            loss -= ce_scale * o.ce_weight * _times(y, log_p).sum(-1)
            grad += ce_scale * o.ce_weight * (log_p.exp() - y)
    if o.softcap is not None:
        grad *= (scaled / o.softcap).cosh() ** -2  # 1 − tanh² would cancel
    grad *= o.student_scale
    return loss.masked_fill(ignored, 0.0), grad.masked_fill(ignored[:, None], 0.0)


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p · x with 0 · ±inf = 0, and 0 · (inf − inf) too; a NaN of p stays."""
    return torch.where(p == 0, 0.0, p * x)


def _divergence(log_p: Tensor, p: Tensor, log_q: Tensor, o: DistillOptions) -> tuple[Tensor, Tensor]:
    """D ``[R]`` and dD/da ``[R, V]``."""
    q = log_q.exp()
    if o.divergence == "forward":
        return _times(q, log_q - log_p).sum(-1), p - q
    if o.divergence == "reverse":
        value = _times(p, log_p - log_q).sum(-1)
        return value, _times(p, log_p - log_q - value[:, None])
    beta = torch.tensor(o.js_beta, dtype=p.dtype, device=p.device)
    log_m = torch.logaddexp(log_q + beta.log(), log_p + (-beta).log1p())
    from_p = _times(p, log_p - log_m).sum(-1)
    value = beta * _times(q, log_q - log_m).sum(-1) + (1 - beta) * from_p
    return value, (1 - beta) * _times(p, log_p - log_m - from_p[:, None])


def _topk_divergence(log_p: Tensor, p: Tensor, log_q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the teacher's k largest; an index that comes twice counts twice."""
    log_q, indices = log_q.double(), indices.long()
    q = log_q.exp()
    value = _times(q, log_q - log_p.gather(-1, indices)).sum(-1)
    return value, (p * q.sum(-1, keepdim=True)).scatter_add(-1, indices, -q)
