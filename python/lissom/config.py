"""What to turn a layer into: frozen dataclasses, one per method. No torch, no kernels.

``KINDS`` maps the names used in recipes (``int8``) to the classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["KINDS", "Int8", "from_dict", "to_dict"]

ActivationMode = Literal["dynamic", "static"]
Calibration = Literal["absmax", "percentile", "mse", "entropy"]
Preference = Literal["speed", "size"]


@dataclass(frozen=True)
class Int8:
    """8-bit weights, symmetric per output channel.

    Attributes:
        activation: ``"dynamic"`` quantizes activations per row as they come; ``"static"`` uses one scale per
            layer found by calibration (needs calibration data); None keeps them in floating point
            (weight-only).
        calibration: how a static scale is found: ``"absmax"``, ``"percentile"``, ``"mse"`` (least squared
            error) or ``"entropy"`` (least KL divergence).
        percentile: of the absolute activation values, in (0, 100], for ``calibration="percentile"``.
        smooth: None, or SmoothQuant's migration strength α in [0, 1] (0.5 is usual): activation outliers are
            moved into the weights before quantization. Needs calibration data.
        smooth_pairs: None finds the (LayerNorm, linears) pairs by tracing; or names them:
            ``{"encoder.norm": ["encoder.q", "encoder.k"]}``.
        rotation: multiply weights and activations by a block Hadamard matrix before quantizing them, which
            spreads activation outliers: far better accuracy for a few percent of time, without any data. None
            leaves the choice to the caller: ``compress_`` turns it on, ``Int8Linear.from_linear`` does not.
            Weight-only layers have no use for it.
        embeddings: also convert ``nn.Embedding`` (rowwise scales).
        prefer: ``"speed"`` keeps a linear only where it was measured faster; ``"size"`` keeps it anyway.
    """

    activation: ActivationMode | None = "dynamic"
    calibration: Calibration = "absmax"
    percentile: float = 99.99
    smooth: float | None = None
    smooth_pairs: Mapping[str, tuple[str, ...]] | None = None
    rotation: bool | None = None
    embeddings: bool = True
    prefer: Preference = "speed"

    def __post_init__(self) -> None:
        _one_of(self, "activation", (*get_args(ActivationMode), None))
        _one_of(self, "calibration", get_args(Calibration))
        _one_of(self, "prefer", get_args(Preference))
        _one_of(self, "rotation", (True, False, None))
        if self.rotation and self.activation is None:
            raise ValueError("Int8: rotation=True has no use with activation=None; leave one of the two out")
        if not isinstance(self.embeddings, bool):
            raise TypeError(f"Int8: embeddings={self.embeddings!r} must be True or False")
        if not isinstance(self.percentile, int | float) or not 0 < self.percentile <= 100:
            raise ValueError(f"Int8: percentile={self.percentile!r} must lie in (0, 100]; 99.99 is usual")
        if self.smooth is not None and (
            not isinstance(self.smooth, int | float) or not 0 <= self.smooth <= 1
        ):
            raise ValueError(
                f"Int8: smooth={self.smooth!r} must lie in [0, 1]; 0.5 is usual, None turns it off"
            )
        if self.smooth_pairs is not None:
            if self.smooth is None:
                raise ValueError("Int8: smooth_pairs is given but smooth is None; set smooth=0.5")
            pairs = {str(norm): tuple(linears) for norm, linears in dict(self.smooth_pairs).items()}
            object.__setattr__(self, "smooth_pairs", pairs)


def _one_of(config: object, name: str, allowed: tuple[object, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{type(config).__name__}: {name}={value!r} is unknown; use one of {choices}")


KINDS: dict[str, type[Int8]] = {"int8": Int8}


def to_dict(config: Int8) -> dict[str, Any]:
    """Plain dict (JSON, YAML) of a config: ``{"kind": "int8", …}``."""
    kind = next(name for name, cls in KINDS.items() if type(config) is cls)
    return {"kind": kind, **dataclasses.asdict(config)}


def from_dict(data: Mapping[str, Any]) -> Int8:
    """Inverse of :func:`to_dict`; ValueError names an unknown kind or key."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"recipe: kind={kind!r} is unknown; use one of {', '.join(map(repr, KINDS))}")
    cls = KINDS[kind]
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise ValueError(f"recipe: unknown key {unknown[0]!r} for {kind}; known keys: {', '.join(known)}")
    return cls(**fields)
