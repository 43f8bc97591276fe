"""``DistillationLoss``, ``LinearDistillationLoss``, ``HiddenStateLoss``: what a student is trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import distill_loss, linear_distill_loss
from ..ops.distill_loss import check_distill_options
from ..reference.distill_loss import DistillOptions

__all__ = ["DistillationLoss", "HiddenStateLoss", "LinearDistillationLoss"]


class _DistillationOptions(nn.Module):
    """The options that both losses of logits hold."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        entropy_weight: float = 0.0,
        divergence: str = "forward",
        js_beta: float = 0.5,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        reduction: str = "batchmean",
        shift_labels: bool = False,
    ) -> None:
        super().__init__()
        options = DistillOptions(
            temperature,
            kl_weight,
            ce_weight,
            entropy_weight,
            divergence,
            js_beta,
            ignore_index,
            label_smoothing,
            softcap,
            student_scale,
            teacher_scale,
        )
        check_distill_options(type(self).__name__, options, reduction)
        self.options = options
        self.reduction = reduction
        self.shift_labels = shift_labels

    def _arguments(self) -> dict[str, Any]:
        return asdict(self.options) | {"reduction": self.reduction}

    def _rows(self, shape: torch.Size, labels: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Labels of rows ``shape``, shifted if so asked, where the mask is 0 those that do not count."""
        ignored = self.options.ignore_index
        for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{type(self).__name__}: {name} has shape {tuple(tensor.shape)}; it must be "
                    f"{tuple(shape)}: one per row of the student's"
                )
        if attention_mask is not None:
            if labels is None:
                if self.options.ce_weight:
                    raise ValueError(
                        f"{type(self).__name__}: labels is None but ce_weight={self.options.ce_weight}; give "
                        "labels, or ce_weight=0"
                    )
                labels = torch.zeros(shape, dtype=torch.int64, device=attention_mask.device)
            labels = labels.masked_fill(attention_mask == 0, ignored)
        if labels is not None and self.shift_labels:
            if not labels.dim():
                raise ValueError(f"{type(self).__name__}: shift_labels needs rows in sequences, [..., S, V]")
            # The labels move, not the logits, which would have to be copied without their last row.
            labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)
        return labels

    def extra_repr(self) -> str:
        defaults = asdict(DistillOptions()) | {"reduction": "batchmean", "shift_labels": False}
        own = self._arguments() | {"shift_labels": self.shift_labels}
        return ", ".join(
            f"{name}={own[name]!r}"
            for name, default in defaults.items()
            if own[name] != default or name == "temperature"
        )


class DistillationLoss(_DistillationOptions):
    """T² · (kl_weight · D(teacher, student) + entropy_weight · H(student)) + ce_weight · CE, of logits.

    Args:
        temperature, kl_weight, ce_weight, entropy_weight, divergence, js_beta, ignore_index,
            label_smoothing, softcap, student_scale, teacher_scale, reduction: as in
            :func:`lissom.ops.distill_loss`.
        shift_labels: the labels are the input's own tokens, as Hugging Face's causal models take them: row i
            is held to label i + 1, and the last row of a sequence counts in no term.

    Raises:
        ValueError: an option without a meaning.

    Source: see :mod:`lissom.reference.distill_loss`.
    """

    def forward(
        self,
        student: Any,
        teacher: Any = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            student, teacher: logits ``[..., V]``, or what has them as ``.logits``, as Hugging Face's outputs
                do. The teacher never gets a gradient, and is not needed where ``kl_weight`` is 0.
            labels: int64 ``[...]`` or None; ``ignore_index`` where a row counts in no term.
            attention_mask: ``[...]``: rows with 0 count in no term; with ``shift_labels`` those before a 0.

        Returns:
            float32 scalar, or ``[...]`` for ``reduction="none"``.

        Raises:
            TypeError, ValueError: as :func:`lissom.ops.distill_loss`.
        """
        logits = _logits("student", student)
        others = None if teacher is None else _logits("teacher", teacher)
        rows = self._rows(logits.shape[:-1], labels, attention_mask)
        return distill_loss(logits, others, rows, **self._arguments())


class LinearDistillationLoss(_DistillationOptions):
    """:class:`DistillationLoss` from hidden states and output layers; ``[tokens, vocabulary]`` is never held.

    Args:
        memory_budget: bytes for the logits of the tokens that are worked on at once; None chooses.
        options: as for :class:`DistillationLoss`.

    Raises:
        ValueError: an option without a meaning.

    Source: see :func:`lissom.ops.linear_distill_loss`.
    """

    def __init__(self, *, memory_budget: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if memory_budget is not None and memory_budget <= 0:
            raise ValueError(
                f"LinearDistillationLoss: memory_budget={memory_budget} must be positive: bytes for the "
                "logits of a chunk; None chooses"
            )
        self.memory_budget = memory_budget

    def forward(
        self,
        student_hidden: Tensor,
        student_head: nn.Module | Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: nn.Module | Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        teacher_topk: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            student_hidden, teacher_hidden: last hidden states ``[..., K]``, with the final norm applied.
            student_head, teacher_head: the output layer, such as ``model.get_output_embeddings()``: a module
                with ``weight`` ``[V, K]`` and perhaps ``bias``, or the weight.
            labels, attention_mask: as for :class:`DistillationLoss`.
            teacher_logits, teacher_topk: instead of the teacher's hidden states, as in
                :func:`lissom.ops.linear_distill_loss`.

        Returns:
            float32 scalar, or ``[...]`` for ``reduction="none"``. Gradients reach the hidden states and
            ``student_head``.

        Raises:
            TypeError, ValueError: as :func:`lissom.ops.linear_distill_loss`.
        """
        weight, bias = _head("student_head", student_head)
        other_weight, other_bias = (
            (None, None) if teacher_head is None else _head("teacher_head", teacher_head)
        )
        return linear_distill_loss(
            student_hidden,
            weight,
            bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=other_weight,
            teacher_bias=other_bias,
            teacher_logits=teacher_logits,
            teacher_topk=teacher_topk,
            labels=self._rows(student_hidden.shape[:-1], labels, attention_mask),
            memory_budget=self.memory_budget,
            **self._arguments(),
        )

    def extra_repr(self) -> str:
        budget = "" if self.memory_budget is None else f", memory_budget={self.memory_budget}"
        return super().extra_repr() + budget


def _logits(name: str, given: Any) -> Tensor:
    found = given if isinstance(given, Tensor) else getattr(given, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"DistillationLoss: {name} is {type(given).__name__}; give logits, or a model's output that has "
            "them as .logits"
        )
    return found


def _head(name: str, head: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(head, Tensor):
        return head, None
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"LinearDistillationLoss: {name} is {type(head).__name__}; give the output layer, such as "
            "model.get_output_embeddings(), or its weight"
        )
    return weight, bias if isinstance(bias, Tensor) else None


LOSSES = ("mse", "cosine")


class HiddenStateLoss(nn.Module):
    """How far a student's hidden states are from a teacher's: the mean over pairs of layers.

    With P the pair's projection, h and g hidden states of one token, and means over the tokens that count::

        mse:    mean of |P h − g|² / width          cosine: mean of 1 − cos(P h, g)

    Args:
        layer_map: which layer of the student is held to which of the teacher, ``{student: teacher}``; indices
            into their hidden states (Hugging Face: 0 is the embeddings, −1 the last layer).
            :meth:`every_so_many` makes one.
        student_dim, teacher_dim: widths of the hidden states. Where they differ, each pair has a learned
            projection ``nn.Linear(student_dim, teacher_dim)``, trained with the student and left behind.
        loss: ``"mse"`` or ``"cosine"``.
        bias: of the projections.
        project: None projects where the widths differ; True always.
        device, dtype: of the projections.

    Raises:
        ValueError: no layers, an unknown loss, ``project=False`` for different widths.

    Source: Romero et al., "FitNets", 2015 (hints through a regressor); Jiao et al., "TinyBERT", 2020 (MSE of
    mapped layers, projected); Sanh et al., "DistilBERT", 2019 (cosine).
    """

    def __init__(
        self,
        layer_map: Mapping[int, int],
        student_dim: int,
        teacher_dim: int,
        *,
        loss: str = "mse",
        bias: bool = True,
        project: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not layer_map:
            raise ValueError("HiddenStateLoss: layer_map is empty; name at least one pair, such as {-1: -1}")
        if loss not in LOSSES:
            raise ValueError(f"HiddenStateLoss: loss={loss!r} is unknown; use one of {LOSSES}")
        project = student_dim != teacher_dim if project is None else project
        if not project and student_dim != teacher_dim:
            raise ValueError(
                f"HiddenStateLoss: project=False but student_dim={student_dim} is not "
                f"teacher_dim={teacher_dim}; leave it None"
            )
        self.layer_map = {int(student): int(teacher) for student, teacher in layer_map.items()}
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.loss = loss
        self.projections = nn.ModuleList(
            nn.Linear(student_dim, teacher_dim, bias, device=device, dtype=dtype)
            if project
            else nn.Identity()
            for _ in self.layer_map
        )

    @staticmethod
    def every_so_many(student_layers: int, teacher_layers: int) -> dict[int, int]:
        """A map of each of the student's layers, embeddings included, to one of the teacher's, evenly spaced.

        Layers are counted without the embeddings: 3 and 12 give ``{0: 0, 1: 4, 2: 8, 3: 12}``.
        """
        if student_layers < 1 or teacher_layers < 1:
            raise ValueError(
                f"HiddenStateLoss.every_so_many: {student_layers} and {teacher_layers} layers; each needs one"
            )
        return {i: i * teacher_layers // student_layers for i in range(student_layers + 1)}

    def forward(self, student: Any, teacher: Any, attention_mask: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            student, teacher: hidden states ``[..., width]``, one tensor per layer, or what has them as
                ``.hidden_states``, as Hugging Face's outputs do with ``output_hidden_states=True``. The
                teacher gets no gradient.
            attention_mask: ``[...]``: tokens with 0 do not count. NaN where none does.

        Raises:
            TypeError, ValueError: no hidden states, a layer that is not there, widths or shapes that do not
                fit.
        """
        own, others = _hidden_states("student", student), _hidden_states("teacher", teacher)
        total: Tensor | None = None
        for (i, j), projection in zip(self.layer_map.items(), self.projections, strict=True):
            h = _layer("student", own, i, self.student_dim)
            g = _layer("teacher", others, j, self.teacher_dim).detach()
            if h.shape[:-1] != g.shape[:-1]:
                raise ValueError(
                    f"HiddenStateLoss: the student's layer {i} has shape {tuple(h.shape)} but the teacher's "
                    f"layer {j} {tuple(g.shape)}; both must be of the same tokens"
                )
            if attention_mask is not None and attention_mask.shape != h.shape[:-1]:
                raise ValueError(
                    f"HiddenStateLoss: attention_mask has shape {tuple(attention_mask.shape)}; it must be "
                    f"{tuple(h.shape[:-1])}: one per token"
                )
            term = self._of_layer(h, g, projection, attention_mask)
            total = term if total is None else total + term
        assert total is not None
        return total / len(self.layer_map)

    def _of_layer(self, h: Tensor, g: Tensor, projection: nn.Module, mask: Tensor | None) -> Tensor:
        if mask is not None:  # before anything else: what padding holds, NaN too, must not reach a gradient
            h, g = (x.masked_fill((mask == 0).unsqueeze(-1), 0.0) for x in (h, g))
        h, g = projection(h).float(), g.float()
        if self.loss == "mse":
            tokens = (h - g).square().mean(-1)
        else:
            tokens = 1 - nn.functional.cosine_similarity(h, g, dim=-1)
        if mask is None:
            return tokens.mean()
        return tokens.masked_fill(mask == 0, 0.0).sum() / (mask != 0).sum()

    def extra_repr(self) -> str:
        return f"layer_map={self.layer_map}, {self.student_dim}, {self.teacher_dim}, loss={self.loss!r}"


def _hidden_states(name: str, given: Any) -> Sequence[Tensor]:
    found = given if isinstance(given, list | tuple) else getattr(given, "hidden_states", None)
    if not isinstance(found, list | tuple):
        raise TypeError(
            f"HiddenStateLoss: {name} is {type(given).__name__} without hidden states; give a sequence of "
            "tensors, or a model's output with output_hidden_states=True"
        )
    return found


def _layer(name: str, states: Sequence[Tensor], index: int, width: int) -> Tensor:
    if not -len(states) <= index < len(states):
        raise ValueError(
            f"HiddenStateLoss: layer_map names layer {index} of the {name}, which has {len(states)} hidden "
            "states"
        )
    if states[index].shape[-1] != width:
        raise ValueError(
            f"HiddenStateLoss: the {name}'s layer {index} has width {states[index].shape[-1]}, not "
            f"{name}_dim={width}"
        )
    return states[index]
