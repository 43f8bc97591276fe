"""What to turn a layer into: frozen dataclasses, one per method. No torch, no kernels.

``KINDS`` maps the names used in recipes (``int8``, ``int4``, ``block_sparse``) to the classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

__all__ = ["KINDS", "BlockSparse", "Config", "Int4", "Int8", "from_dict", "to_dict"]

ActivationMode = Literal["dynamic", "static"]
Calibration = Literal["absmax", "percentile", "mse", "entropy"]
Preference = Literal["speed", "size"]
Codebook = Literal["nf4", "kmeans"]
CodebookScope = Literal["tensor", "channel", "group"]
Int4Method = Literal["hqq", "mse", "rtn"]
Int4Activation = Literal["int8"]
Int4Embeddings = Literal["int8", "int4"]
BlockSparseDtype = Literal["float32", "bfloat16", "float16", "int8"]
BlockScore = Literal["l2", "l1", "wanda"]
SparsityScope = Literal["uniform", "global"]

GROUP_SIZES = (32, 64, 128, -1)
"""Columns of a weight that share a scale; -1 is the whole row."""


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


@dataclass(frozen=True)
class Int4:
    """4-bit weights in groups along the input features, uniform or through a table of 16 values.

    Attributes:
        group_size: columns of a row that share a scale: 32, 64, 128, or -1 for the whole row (None and
            ``"row"`` are taken as -1). Smaller groups are more accurate, larger and slower.
        symmetric: no zero-points: smaller and a little faster, less accurate. Means nothing with a codebook.
        codebook: None for evenly spaced values; ``"nf4"`` for quantiles of a normal distribution (Dettmers
            et al., "QLoRA", 2023); ``"kmeans"`` for values learned from the weights (weight sharing).
        codebook_scope: what shares one k-means table: ``"tensor"``, ``"channel"`` (an output; the default) or
            ``"group"``. NF4 is one table for all.
        method: how scales and zero-points are found without data: ``"hqq"`` (half-quadratic; Badri and
            Shaji, 2023), ``"mse"`` (clip search) or ``"rtn"`` (round to nearest). Means nothing with a
            codebook.
        activation: ``"int8"`` quantizes activations per row as they come; None keeps them in floating point
            (weight-only).
        rotation: as in :class:`Int8`.
        embeddings: also convert ``nn.Embedding``: ``"int8"`` (rowwise scales), ``"int4"``, or None.
        prefer: ``"speed"`` keeps a linear only where it was measured faster; ``"size"`` keeps it anyway.
    """

    group_size: int = 128
    symmetric: bool = False
    codebook: Codebook | None = None
    codebook_scope: CodebookScope | None = None
    method: Int4Method = "hqq"
    activation: Int4Activation | None = "int8"
    rotation: bool | None = None
    embeddings: Int4Embeddings | None = "int8"
    prefer: Preference = "speed"

    def __post_init__(self) -> None:
        size: Any = self.group_size
        if size is None or size == "row":
            object.__setattr__(self, "group_size", -1)
        elif isinstance(size, bool) or not isinstance(size, int) or size not in GROUP_SIZES:
            raise ValueError(
                f"Int4: group_size={size!r} cannot be; use 32, 64, 128, or -1 for one group per row (any "
                "number of input features works with each)"
            )
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"Int4: symmetric={self.symmetric!r} must be True or False")
        _one_of(self, "codebook", (None, *get_args(Codebook)))
        _one_of(self, "codebook_scope", (None, *get_args(CodebookScope)))
        _one_of(self, "method", get_args(Int4Method))
        _one_of(self, "activation", (*get_args(Int4Activation), None))
        _one_of(self, "rotation", (True, False, None))
        _one_of(self, "embeddings", (*get_args(Int4Embeddings), None))
        _one_of(self, "prefer", get_args(Preference))
        if self.rotation and self.activation is None:
            raise ValueError("Int4: rotation=True has no use with activation=None; leave one of the two out")
        scopes: dict[str | None, tuple[str, ...]] = {
            None: (),
            "nf4": ("tensor",),
            "kmeans": ("channel", "tensor", "group"),
        }
        legal = scopes[self.codebook]
        if self.codebook_scope is None:
            object.__setattr__(self, "codebook_scope", legal[0] if legal else None)
        elif self.codebook_scope not in legal:
            fix = f"leave it out, or use one of {', '.join(map(repr, legal))}" if legal else "leave it out"
            raise ValueError(
                f"Int4: codebook_scope={self.codebook_scope!r} has no meaning with "
                f"codebook={self.codebook!r}; {fix}"
            )


@dataclass(frozen=True)
class BlockSparse:
    """Linears whose weight is kept in blocks only where it matters; the other blocks are not stored.

    Embeddings are left alone.

    Attributes:
        sparsity: share of the weights that are dropped, in [0, 1).
        block_shape: ``(outputs, inputs)`` of a block; blocks at the edges may be cut off. Any shape works;
            (8, 1), (16, 1), (4, 4), (8, 4), (16, 4), (16, 16), (32, 32) and (64, 64) have kernels of their
            own on a CPU; tensor cores of a GPU multiply blocks of 16, 32, 64 or 128 each way. Smaller blocks
            are more accurate. ``"auto"``: ``compress_`` takes the fastest of these on this machine for the
            layer's size and input; without an input to measure, and in ``SparseLinear.from_linear``, (8, 1),
            or (8, 4) with ``dtype="int8"``, and (32, 32) on a GPU.
        dtype: of the stored values: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"int8"`` (a scale per
            output; activations are quantized per row as they come, as under :class:`Int8`). A GPU multiplies
            int8 on its tensor cores, bfloat16 and float16 with inputs of the same type, and float32 with
            bfloat16 inputs. float16 holds weights up to 65504; layers with larger ones are left alone.
        method: what a block is worth: ``"l2"`` (root of the sum of squares), ``"l1"`` (sum of magnitudes),
            or ``"wanda"`` (magnitudes times the norms of the inputs that they meet; needs calibration data).
        scope: ``"uniform"`` reaches the sparsity in every layer by itself (with ``"wanda"``, in every row of
            blocks); ``"global"`` lets all layers that this config is for compete, so that a layer whose
            weight sits in few blocks gives more (LAMP; Lee et al., 2021).
        prefer: ``"speed"`` keeps a linear only where it was measured faster; ``"size"`` keeps it anyway.
    """

    sparsity: float = 0.8
    block_shape: tuple[int, int] | Literal["auto"] = "auto"
    dtype: BlockSparseDtype = "float32"
    method: BlockScore = "l2"
    scope: SparsityScope = "uniform"
    prefer: Preference = "speed"

    def __post_init__(self) -> None:
        sparsity: Any = self.sparsity
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
            raise ValueError(
                f"BlockSparse: sparsity={sparsity!r} must lie in [0, 1): the share of weights that are "
                "dropped; 0.8 is usual"
            )
        shape: Any = self.block_shape
        if shape != "auto":
            sides = tuple(shape) if isinstance(shape, list | tuple) else ()
            if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
                raise ValueError(
                    f"BlockSparse: block_shape={shape!r} must be two positive integers (outputs, inputs), "
                    "such as (8, 1), or 'auto'"
                )
            object.__setattr__(self, "block_shape", sides)
        _one_of(self, "dtype", get_args(BlockSparseDtype))
        _one_of(self, "method", get_args(BlockScore))
        _one_of(self, "scope", get_args(SparsityScope))
        _one_of(self, "prefer", get_args(Preference))


Config: TypeAlias = Int8 | Int4 | BlockSparse


def _one_of(config: object, name: str, allowed: tuple[object, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{type(config).__name__}: {name}={value!r} is unknown; use one of {choices}")


KINDS: dict[str, type[Int8] | type[Int4] | type[BlockSparse]] = {
    "int8": Int8,
    "int4": Int4,
    "block_sparse": BlockSparse,
}


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dict (JSON, YAML) of a config: ``{"kind": "int8", …}``."""
    kind = next(name for name, cls in KINDS.items() if type(config) is cls)
    return {"kind": kind, **dataclasses.asdict(config)}


def from_dict(data: Mapping[str, Any]) -> Config:
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
