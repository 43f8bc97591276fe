"""How numbers are quantized and packed. Device-free, in plain torch.

This file and ``csrc/common/formats.h`` are the only owners of the packed layouts; a test compares the
two byte for byte.

int8 weights
------------
Symmetric per output channel (row of the weight): ``scale = absmax / 127``,
``q = round_half_even(w * (127 / absmax))`` in [-127, 127]; an all-zero row has scale 0.

*Canonical* layout (what ``state_dict`` and files hold): ``qweight`` int8 ``[N, K]``, ``weight_scale``
float32 ``[N]``.

*Packed* layout (a cache that kernels read): panels of 16 outputs, interleaved by 4 along K, so that one
64-byte line holds what one AVX-512 register multiplies::

    panel p = outputs 16p … 16p+15, (1 + ceil(K/4)) lines of 64 bytes:

    line 0      c0       c1       …   c15          int32: -128 * sum_k q[n, k]  (offset of u8 activations)
    line 1      n0k0..3  n1k0..3  …   n15k0..3     int8:  4 k-values of each of the 16 outputs
    line 2      n0k4..7  n1k4..7  …   n15k4..7
    …

Rows and columns past N and K are zero.

int4 weights
------------
Codes 0…15 in groups of 32, 64 or 128 columns, or one group for the whole row, each with a scale::

    w = (q - zero_point) * scale        uniform; symmetric: zero_point = 8
    w = codebook[q] * scale             a table of 16 values per tensor, per output or per group

*Canonical* layout (:class:`Int4Weights`): ``qweight`` uint8 ``[N, ceil(K/2)]``, columns 2i and 2i+1 in the
low and high nibble of byte i; ``weight_scale`` and ``zero_point`` ``[N, G]``. ``group_index`` (GPTQ's
``g_idx``) names the group of each column where groups are not runs of neighbours; the packed layout and the
kernels take the columns in the order of their groups.

*Packed* layout: panels of 16 outputs as above. K is cut into *segments*, the groups (a whole row: pieces of
128), and a segment into blocks of 32 columns; all in lines of 64 bytes::

    panel = [tables]  segment  segment  …               tables here: codebook per tensor or per output
    segment = scales  [offsets]  [tables]  block  …     offsets: with zero-points; tables: codebook per group

    scales, offsets     16 float32, one per output: s, and c = s * (8 - zero_point), so that
                        w = (q - 8) * s + c
    block (uniform)     4 lines; byte 4n+j of line i:  low nibble k = 8i+j, high nibble k = 8i+4+j of output n
    block (codebook)    4 lines; byte 16l+b of line i: low nibble k = b, high nibble k = 16+b of output 4l+i
    tables, int8 form   4 lines; byte 16l+e of line i: entry e of output 4l+i's table as int8, plus 128
    tables, weight-only 4 planes of such 4 lines: the bytes of the float32 entries, lowest first

Everything of outputs past N is zero; codes of columns past K are zero. In the int8 form a table is quantized
as the rows of an int8 weight are, and its scale goes into s.

*Fragments* (:func:`pack_int4_fragments`): the packed layout of the CUDA kernels, int32 ``[panels, words]``. A
panel of 16 outputs is read 16 bytes a lane, which are what the lane of a warp multiplies next: codes lie as
``mma``'s first operand does (16 outputs by 16 k-values of 16 bits, by 32 of int8)::

    panel = units  [tables]  [terms]  chunk  chunk  …      a chunk: 128 columns; terms here: one group a row
    chunk = unit 0  unit 1  [terms]                        a unit: 64 columns, 512 bytes

    units     16 float32: the power of two at or below the largest scale of each output, within 2^-126 … 2^100
    tables    16 x 16: float32 with the largest in [1, 2), its power of two in s; int8 form: int8, as above
    terms     per segment of the chunk, of each output: its scale and its zero-point (8 where there are
              none), float32
    unit      lane 4g + t, word j, of outputs g (h = 0) and g + 8 (h = 1):
              weight-only   columns 16j + 8p + 2t + e    in nibble h + 2p + 4e
              int8          columns 16j + 4t + e         in nibble h + 2e, with a codebook 4h + e

Codes past N and K are zero, terms too.

Block-sparse weights
--------------------
:class:`BlockSparseWeights`; drawn in ``_block_sparse_formats.py``.

Rotation
--------
An optional change of basis that spreads outliers: every full block of 16 along K is multiplied by a Hadamard
matrix H (H·H = 16·I), weights by H and activations by H/16, which leaves the product as it was. Sizes that no
longer hang on one large element quantize better: MiniLM's activations gain about 9 dB.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._block_sparse_formats import (
    BLOCK_SPARSE_DTYPES,
    BlockSparseWeights,
    block_mask,
    block_sparse_from_dense,
    block_sparse_from_torch,
    block_sparse_to_dense,
    block_sparse_to_torch,
    check_block_sparse,
    check_block_sparse_indices,
    check_block_sparse_shapes,
    dequantize_block_sparse,
    pack_block_sparse,
    packed_block_sparse_bytes,
    quantize_block_sparse,
)
from .config import GROUP_SIZES
from .reference.numerics import fma

__all__ = [
    "BLOCK_SPARSE_DTYPES",
    "INT4_SEGMENT",
    "INT8_MAX_IN_FEATURES",
    "INT8_PANEL",
    "INT8_QUAD",
    "ROTATION_BLOCK",
    "BlockSparseWeights",
    "Int4Weights",
    "block_mask",
    "block_sparse_from_dense",
    "block_sparse_from_torch",
    "block_sparse_to_dense",
    "block_sparse_to_torch",
    "check_block_sparse",
    "check_block_sparse_indices",
    "check_block_sparse_shapes",
    "check_int4",
    "check_int4_shapes",
    "dequantize_block_sparse",
    "dequantize_int4",
    "dequantize_int8",
    "group_order",
    "int4_fragments_shape",
    "int4_groups",
    "pack_block_sparse",
    "pack_int4",
    "pack_int4_fragments",
    "pack_int8",
    "pack_nibbles",
    "packed_block_sparse_bytes",
    "packed_int4_shape",
    "packed_int8_shape",
    "quantize_block_sparse",
    "quantize_int8",
    "rotate",
    "segment_terms",
    "unpack_int4",
    "unpack_int8",
    "unpack_nibbles",
]

INT8_PANEL = 16
"""Outputs in one packed panel."""

INT8_QUAD = 4
"""Consecutive k-values of one output that lie side by side."""

INT8_LINE = INT8_PANEL * INT8_QUAD

INT4_LEVELS = 16

INT4_ZERO = 8
"""Code that stands for 0 where there are no zero-points."""

INT4_BLOCK = 32
"""Columns of one packed block."""

INT4_BLOCK_BYTES = INT8_PANEL * INT4_BLOCK // 2

INT4_SEGMENT = 128
"""Longest run of columns whose exact integer sum a kernel takes before it goes on in float32."""

INT4_CHUNK, INT4_UNIT = 128, 64
"""Columns of a chunk and of a unit of fragments."""

INT4_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT4_ZERO_DTYPES = (torch.uint8, *INT4_SCALE_DTYPES)

ROTATION_BLOCK = 16
"""Elements along K that a rotation mixes."""

INT8_MAX_IN_FEATURES = (2**31 - 1) // (127 * 127)
"""Largest K for which an int32 sum of K products of values within ±127 cannot overflow (133152)."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows symmetrically to int8.

    Args:
        weight: ``[N, K]``, any floating dtype, finite.

    Returns:
        ``(qweight, scale)``: int8 ``[N, K]`` in [-127, 127] and float32 ``[N]``, with
        ``weight ≈ qweight * scale[:, None]``. All-zero rows (and rows whose largest magnitude is below
        about 4e-37, where ``127 / absmax`` overflows) become zeros with scale 0.

    Raises:
        ValueError: NaN or infinity in ``weight``, or not two-dimensional.
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize_int8: weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    w = weight.detach().float()
    absmax = w.abs().amax(dim=1) if w.shape[1] else w.new_zeros(w.shape[0])
    bad = ~torch.isfinite(absmax)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"quantize_int8: weight row {row} holds NaN or infinity ({int(bad.sum())} such rows); "
            "repair the checkpoint before compressing it"
        )
    limit = torch.full_like(absmax, 127.0)  # a tensor: torch turns `127.0 / t` into a rounded reciprocal
    inverse = limit / absmax
    usable = torch.isfinite(inverse)
    inverse = torch.where(usable, inverse, torch.zeros_like(inverse))
    q = (w * inverse[:, None]).round_().to(torch.int8)
    scale = torch.where(usable, absmax / limit, torch.zeros_like(absmax))
    return q, scale


def rotate(x: Tensor, factor: float = 1.0) -> Tensor:
    """Multiply every full block of 16 along the last dimension by ``factor`` · H, H the Hadamard matrix.

    H is its own inverse up to 16: ``rotate(rotate(x), 1 / 16) == x`` up to rounding. A shorter last block is
    left alone. Additions are made in the order of the kernels (Sylvester's butterflies, distance 1, 2, 4, 8),
    after the multiplication, so that float32 results agree bit for bit.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.

    Args:
        x: ``[..., K]``, floating point.

    Returns:
        ``[..., K]`` of the same dtype.
    """
    whole = x.shape[-1] // ROTATION_BLOCK * ROTATION_BLOCK
    blocks = (x[..., :whole] * factor).unflatten(-1, (whole // ROTATION_BLOCK, ROTATION_BLOCK))
    for distance in (1, 2, 4, 8):
        pairs = blocks.unflatten(-1, (ROTATION_BLOCK // (2 * distance), 2, distance))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        blocks = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    return torch.cat((blocks.flatten(-2), x[..., whole:]), dim=-1)


def dequantize_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``qweight * scale`` per row: int8 ``[N, K]`` and float32 ``[N]`` to ``[N, K]`` of ``dtype``."""
    return (qweight.float() * scale.float()[:, None]).to(dtype)


def packed_int8_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of the packed form: (panels, bytes per panel)."""
    panels = -(-out_features // INT8_PANEL)
    quads = -(-in_features // INT8_QUAD)
    return panels, (1 + quads) * INT8_LINE


def pack_int8(qweight: Tensor) -> Tensor:
    """Pack canonical int8 ``[N, K]`` into the layout drawn above; int8 ``[panels, bytes]``."""
    n, k = qweight.shape
    panels, width = packed_int8_shape(n, k)
    quads = width // INT8_LINE - 1
    padded = qweight.new_zeros(panels * INT8_PANEL, quads * INT8_QUAD)
    padded[:n, :k] = qweight
    sums = (padded.sum(dim=1, dtype=torch.int32) * -128).view(panels, INT8_PANEL)
    lines = padded.view(panels, INT8_PANEL, quads, INT8_QUAD).permute(0, 2, 1, 3)
    packed = qweight.new_empty(panels, width)
    packed[:, :INT8_LINE] = sums.view(torch.int8)
    packed[:, INT8_LINE:] = lines.reshape(panels, quads * INT8_LINE)
    return packed


def unpack_int8(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of :func:`pack_int8`: int8 ``[N, K]``."""
    panels, width = packed_int8_shape(out_features, in_features)
    quads = width // INT8_LINE - 1
    lines = packed[:, INT8_LINE:].view(panels, quads, INT8_PANEL, INT8_QUAD).permute(0, 2, 1, 3)
    return lines.reshape(panels * INT8_PANEL, quads * INT8_QUAD)[:out_features, :in_features].contiguous()


@dataclass(frozen=True, eq=False)
class Int4Weights:
    """A weight ``[N, K]`` in 4 bits, canonical layout. A plain record: :func:`check_int4` judges it.

    Attributes:
        qweight: uint8 ``[N, ceil(K/2)]``, codes 0…15 as :func:`pack_nibbles` makes them.
        weight_scale: ``[N, G]``, float16, bfloat16 or float32; finite, of any sign.
        zero_point: None (symmetric: 8), or ``[N, G]``, uint8 or one of the float types, finite.
        codebook: None, or float32 ``[16]``, ``[N, 16]`` or ``[N, G, 16]``, finite; then without zero_point.
        group_index: None (column k belongs to group k // group_size), or int32 ``[K]``: the group of every
            column. Every group but the last has group_size members, the last one the rest.
        in_features: K.
        group_size: 32, 64, 128, or -1: the whole row. G = ceil(K / group_size), or 1.
    """

    qweight: Tensor
    weight_scale: Tensor
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
    group_index: Tensor | None = None
    in_features: int = field(kw_only=True)
    group_size: int = field(kw_only=True)

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[0]

    @property
    def segment_size(self) -> int:
        """Columns of a segment (the last one may have fewer)."""
        return INT4_SEGMENT if self.group_size == -1 else self.group_size

    @property
    def segments(self) -> int:
        """Number of segments."""
        return -(-self.in_features // self.segment_size)

    @property
    def table_scope(self) -> int:
        """Where the packed form holds tables: 0 nowhere, 1 once per panel, 2 in every segment."""
        return 0 if self.codebook is None else 1 + (self.codebook.dim() == 3)


def int4_groups(in_features: int, group_size: int) -> int:
    """G, the number of groups of a row."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Integers 0…15 ``[..., K]`` to uint8 ``[..., ceil(K/2)]``, even columns in the low nibble."""
    codes = codes.to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.cat((codes, codes.new_zeros(*codes.shape[:-1], 1)), dim=-1)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, in_features: int) -> Tensor:
    """Inverse of :func:`pack_nibbles`: uint8 codes ``[..., in_features]``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :in_features]


def check_int4_shapes(weights: Int4Weights, name: str = "Int4Weights") -> None:
    """Raise unless sizes, shapes and dtypes fit together; looks at no value, so it is cheap.

    Raises:
        TypeError, ValueError: names (after ``name``) the field, what it is and what it must be.
    """
    w = weights
    if w.group_size not in GROUP_SIZES:
        raise ValueError(
            f"{name}: group_size={w.group_size} cannot be; use 32, 64, 128, or -1 for one group per row"
        )
    k, width = w.in_features, -(-w.in_features // 2)
    if w.qweight.dim() != 2 or w.qweight.dtype != torch.uint8 or w.qweight.shape[1] != width:
        error = TypeError if w.qweight.dtype != torch.uint8 else ValueError
        raise error(
            f"{name}: qweight must be uint8 [N, {width}] (two codes a byte) for K={k}, got "
            f"{_seen(w.qweight)}; make it with lissom.formats.pack_nibbles(codes)"
        )
    n, groups = w.qweight.shape[0], int4_groups(k, w.group_size)
    per_group = f"[{n}, {groups}] for K={k}, group_size={w.group_size}"
    if w.weight_scale.dtype not in INT4_SCALE_DTYPES or w.weight_scale.shape != (n, groups):
        raise ValueError(
            f"{name}: weight_scale must be float16, bfloat16 or float32 {per_group}, got "
            f"{_seen(w.weight_scale)}"
        )
    if w.zero_point is not None:
        if w.zero_point.dtype not in INT4_ZERO_DTYPES or w.zero_point.shape != (n, groups):
            raise ValueError(
                f"{name}: zero_point must be uint8, float16, bfloat16 or float32 {per_group}, got "
                f"{_seen(w.zero_point)}"
            )
        if w.codebook is not None:
            raise ValueError(f"{name}: zero_point has no meaning with a codebook; give one of the two")
    if w.codebook is not None:
        shapes = ((INT4_LEVELS,), (n, INT4_LEVELS), (n, groups, INT4_LEVELS))
        if w.codebook.dtype != torch.float32 or w.codebook.shape not in shapes:
            raise ValueError(
                f"{name}: codebook must be float32 [16], [{n}, 16] or [{n}, {groups}, 16] (per tensor, per "
                f"output, per group), got {_seen(w.codebook)}"
            )
    if w.group_index is not None:
        if w.group_index.dtype != torch.int32 or w.group_index.shape != (k,):
            raise ValueError(f"{name}: group_index must be int32 [{k}], got {_seen(w.group_index)}")
        if w.group_size == -1:
            raise ValueError(
                f"{name}: group_index has no meaning with group_size=-1 (one group per row); leave it out"
            )


def check_int4(weights: Int4Weights, name: str = "Int4Weights") -> None:
    """Raise unless ``weights`` are sound, values included: what comes from outside goes through this.

    Raises:
        TypeError, ValueError: names (after ``name``) the field, the value and the fix.
    """
    check_int4_shapes(weights, name)
    w = weights
    floats = {"weight_scale": w.weight_scale, "zero_point": w.zero_point, "codebook": w.codebook}
    for field_name, tensor in floats.items():
        if tensor is not None and tensor.is_floating_point():
            bad = ~tensor.isfinite()
            if bool(bad.any()):
                place = [int(i) for i in bad.nonzero()[0]]
                raise ValueError(
                    f"{name}: {field_name} holds {float(tensor[bad][0])} at {place}; all must be finite: "
                    "repair the checkpoint"
                )
    if w.in_features % 2 and bool((w.qweight[:, -1] > 15).any()):
        raise ValueError(
            f"{name}: qweight has a code in the last high nibble, past K={w.in_features}; it must be 0: was "
            "the weight made for another in_features?"
        )
    if w.group_index is None:
        return
    groups = int4_groups(w.in_features, w.group_size)
    outside = (w.group_index < 0) | (w.group_index >= groups)
    if bool(outside.any()):
        raise ValueError(
            f"{name}: group_index holds {int(w.group_index[outside][0])}; use 0 to {groups - 1}, the groups "
            f"of K={w.in_features}, group_size={w.group_size}"
        )
    members = torch.bincount(w.group_index.long(), minlength=groups)
    sizes = torch.full_like(members, w.group_size)
    sizes[-1:] = w.in_features - (groups - 1) * w.group_size
    wrong = members != sizes
    if bool(wrong.any()):
        g = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: group_index puts {int(members[g])} columns into group {g}, which must have "
            f"{int(sizes[g])} (group_size={w.group_size}, the last group the rest); uneven groups cannot be "
            "served"
        )


def _seen(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def group_order(group_index: Tensor) -> Tensor:
    """int64 ``[K]``: the columns in the order of their groups, in which the packed layout holds them."""
    return torch.argsort(group_index, stable=True)


def dequantize_int4(weights: Int4Weights, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[N, K]`` of ``dtype``: fma(q - 8, s, c), or fl(table * s); in float32, then rounded once.

    ``s = float32(scale)``, ``c = fl(s * (8 - zero_point))`` or 0.
    """
    s = weights.weight_scale.float()[..., None]
    # There are but 16 levels per group: far fewer multiplications than weights, and one gather.
    steps = torch.arange(INT4_LEVELS, dtype=torch.float32, device=s.device) - INT4_ZERO
    if weights.codebook is not None:
        table = weights.codebook
        levels = (table[:, None] if table.dim() == 2 else table) * s
    elif weights.zero_point is not None:
        c = _offset(s, weights.zero_point[..., None])
        levels = fma(steps.expand(*s.shape[:-1], INT4_LEVELS), s, c)
    else:
        levels = steps * s + 0.0  # as fma(steps, s, 0) does: no -0
    k = weights.in_features
    if weights.group_index is not None:
        groups = weights.group_index.long()
    elif weights.group_size == -1:
        groups = torch.zeros(k, dtype=torch.int64, device=s.device)
    else:
        groups = torch.arange(k, device=s.device) // weights.group_size
    codes = unpack_nibbles(weights.qweight, k) + groups * INT4_LEVELS
    return levels.to(dtype).flatten(1).gather(1, codes)


def _offset(scale: Tensor, zero_point: Tensor) -> Tensor:
    """``c`` of w = (q - 8) * s + c."""
    return scale * (INT4_ZERO - zero_point.float())


def segment_terms(weights: Int4Weights, weight_only: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a kernel multiplies a segment with: ``(s, c, tables)``.

    Returns:
        ``s`` float32 ``[N, S]``, S the number of segments; ``c`` likewise, or None without zero-points;
        ``tables``: None, or ``[N, 16]`` or ``[N, S, 16]``: float32 where ``weight_only``, else int8 with
        its scale in ``s``, quantized as :func:`quantize_int8` does rows. A table that holds NaN or infinity
        gets scale NaN.
    """
    s = weights.weight_scale.float()
    c = None if weights.zero_point is None else _offset(s, weights.zero_point)
    tables = weights.codebook
    if tables is not None:
        if not weight_only:
            finite = tables.isfinite().all(dim=-1)
            rows = torch.where(finite[..., None], tables, torch.zeros_like(tables))
            entries, scale = quantize_int8(rows.reshape(-1, INT4_LEVELS))
            scale = scale.view(finite.shape).masked_fill(~finite, torch.nan)
            s = s * (scale[:, None] if scale.dim() == 1 else scale)
            tables = entries.view(tables.shape)
        if tables.dim() == 1:
            tables = tables.expand(weights.out_features, INT4_LEVELS)
    if weights.group_size == -1:  # one group, many segments
        s = s.expand(-1, weights.segments)
        c = None if c is None else c.expand(-1, weights.segments)
        if tables is not None and tables.dim() == 3:
            tables = tables.expand(-1, weights.segments, -1)
    return s, c, tables


def _segment_header(weights: Int4Weights, weight_only: bool) -> tuple[int, int]:
    """Bytes of a panel's tables, and of what precedes the blocks of a segment."""
    tables = (4 if weight_only else 1) * INT8_PANEL * INT4_LEVELS
    lines = 1 if weights.zero_point is None else 2
    scope = weights.table_scope
    return tables * (scope == 1), lines * INT8_LINE + tables * (scope == 2)


def packed_int4_shape(weights: Int4Weights, weight_only: bool = False) -> tuple[int, int]:
    """Shape of the packed form: (panels, bytes per panel)."""
    panels = -(-weights.out_features // INT8_PANEL)
    blocks = -(-weights.in_features // INT4_BLOCK)
    tables, header = _segment_header(weights, weight_only)
    return panels, tables + weights.segments * header + blocks * INT4_BLOCK_BYTES


def pack_int4(weights: Int4Weights, weight_only: bool = False) -> Tensor:
    """Pack into the layout drawn above; uint8 ``[panels, bytes]``. ``weight_only`` must be the op's."""
    n, k = weights.out_features, weights.in_features
    panels, width = packed_int4_shape(weights, weight_only)
    before, header = _segment_header(weights, weight_only)
    s, c, tables = segment_terms(weights, weight_only)

    heads = [_panel_bytes(s)] if c is None else [_panel_bytes(s), _panel_bytes(c)]
    lines = None if tables is None else _table_lines(tables)
    if weights.table_scope == 2 and lines is not None:
        heads.append(lines)
    head = torch.cat(heads, dim=2)

    codes = unpack_nibbles(weights.qweight, k)
    if weights.group_index is not None:
        codes = codes.index_select(1, group_order(weights.group_index))
    blocks = -(-k // INT4_BLOCK)
    padded = codes.new_zeros(panels * INT8_PANEL, blocks * INT4_BLOCK)
    padded[:n, :k] = codes
    body = _blocks(padded, panels, blocks, uniform=tables is None)

    packed = torch.empty(panels, width, dtype=torch.uint8, device=codes.device)
    if weights.table_scope == 1 and lines is not None:
        packed[:, :before] = lines[:, 0]
    per_segment = weights.segment_size // INT4_BLOCK
    full = blocks // per_segment
    step = header + per_segment * INT4_BLOCK_BYTES
    whole = packed[:, before : before + full * step].unflatten(1, (full, step))
    whole[:, :, :header] = head[:, :full]
    whole[:, :, header:] = body[:, : full * per_segment].reshape(panels, full, step - header)
    if blocks % per_segment:
        last = packed[:, before + full * step :]
        last[:, :header] = head[:, full]
        last[:, header:] = body[:, full * per_segment :].flatten(1)
    return packed


def _panel_bytes(values: Tensor) -> Tensor:
    """Float32 ``[N, S]`` as uint8 ``[panels, S, 64]``: for each segment a line of 16 outputs."""
    n, segments = values.shape
    panels = -(-n // INT8_PANEL)
    padded = values.new_zeros(panels * INT8_PANEL, segments)
    padded[:n] = values
    lines = padded.view(torch.uint8).view(panels, INT8_PANEL, segments, 4).transpose(1, 2)
    return lines.reshape(panels, segments, INT8_LINE)


def _table_lines(tables: Tensor) -> Tensor:
    """Tables int8 or float32 ``[N, 16]`` or ``[N, S, 16]`` as uint8 ``[panels, 1 or S, bytes]``."""
    if tables.dim() == 2:
        tables = tables[:, None]
    n, segments = tables.shape[:2]
    panels = -(-n // INT8_PANEL)
    if tables.dtype == torch.int8:
        planes = (tables.to(torch.int16) + 128).to(torch.uint8)[..., None]
    else:
        # A copy: an empty tensor is contiguous whatever its strides are, and then has no such view.
        dense = tables.clone(memory_format=torch.contiguous_format)
        planes = dense.view(torch.uint8).view(n, segments, INT4_LEVELS, 4)
    count = planes.shape[-1]
    padded = planes.new_zeros(panels * INT8_PANEL, segments, INT4_LEVELS, count)
    padded[:n] = planes
    # (panel, l, i, segment, entry, plane) to (panel, segment, plane, line i, l, entry)
    lines = padded.view(panels, 4, 4, segments, INT4_LEVELS, count).permute(0, 3, 5, 2, 1, 4)
    return lines.reshape(panels, segments, count * INT8_PANEL * INT4_LEVELS)


def _blocks(codes: Tensor, panels: int, blocks: int, uniform: bool) -> Tensor:
    """Padded codes to uint8 ``[panels, blocks, 256]``."""
    if uniform:  # (panel, n, block, line i, half, j) to (panel, block, i, n, j)
        parts = codes.view(panels, INT8_PANEL, blocks, 4, 2, 4)
        pairs = (parts[..., 0, :] | (parts[..., 1, :] << 4)).permute(0, 2, 3, 1, 4)
    else:  # (panel, l, i, block, half, b) to (panel, block, i, l, b)
        parts = codes.view(panels, 4, 4, blocks, 2, 16)
        pairs = (parts[..., 0, :] | (parts[..., 1, :] << 4)).permute(0, 3, 2, 1, 4)
    return pairs.reshape(panels, blocks, INT4_BLOCK_BYTES)


def unpack_int4(packed: Tensor, like: Int4Weights, weight_only: bool = False) -> Tensor:
    """``qweight`` of what :func:`pack_int4` made from weights of the form of ``like``.

    Columns are in the order of their groups; scales, offsets and tables are not read back.
    """
    panels, _ = packed_int4_shape(like, weight_only)
    before, header = _segment_header(like, weight_only)
    blocks = -(-like.in_features // INT4_BLOCK)
    per_segment = like.segment_size // INT4_BLOCK
    places = torch.arange(blocks, device=packed.device)
    starts = before + (places // per_segment + 1) * header + places * INT4_BLOCK_BYTES
    offsets = torch.arange(INT4_BLOCK_BYTES, device=packed.device)
    body = packed[:, (starts[:, None] + offsets).flatten()]
    if like.codebook is None:
        parts = body.view(panels, blocks, 4, INT8_PANEL, 4)
        codes = torch.stack((parts & 15, parts >> 4), dim=4).permute(0, 3, 1, 2, 4, 5)
    else:
        parts = body.view(panels, blocks, 4, 4, 16)
        codes = torch.stack((parts & 15, parts >> 4), dim=4).permute(0, 3, 2, 1, 4, 5)
    codes = codes.reshape(panels * INT8_PANEL, blocks * INT4_BLOCK)
    return pack_nibbles(codes[: like.out_features, : like.in_features])


def _entry_bytes(weights: Int4Weights, weight_only: bool) -> int:
    """Of a table in fragments."""
    return 0 if weights.codebook is None else 4 if weight_only else 1


def int4_fragments_shape(weights: Int4Weights, weight_only: bool = False) -> tuple[int, int]:
    """Shape of what :func:`pack_int4_fragments` makes: (panels, words of 4 bytes per panel)."""
    segments = 1 if weights.group_size == -1 else INT4_CHUNK // weights.segment_size
    terms = segments * INT8_PANEL * 8
    once, each = (terms, 0) if weights.group_size == -1 else (0, terms)
    chunks = -(-weights.in_features // INT4_CHUNK)
    header = INT8_PANEL * (4 + INT4_LEVELS * _entry_bytes(weights, weight_only)) + once
    panel = header + chunks * (INT8_PANEL * INT4_CHUNK // 2 + each)
    return -(-weights.out_features // INT8_PANEL), panel // 4


def pack_int4_fragments(weights: Int4Weights, weight_only: bool = False) -> Tensor:
    """Pack for the CUDA kernels as drawn above; int32 ``[panels, words]``. ``weight_only`` must be the op's.

    Raises:
        ValueError: a codebook per group, which those kernels do not serve.
    """
    if weights.table_scope == 2:
        raise ValueError("pack_int4_fragments: a codebook per group has no fragments; use another backend")
    n, k = weights.out_features, weights.in_features
    panels = -(-n // INT8_PANEL)
    chunks = -(-k // INT4_CHUNK)

    codes = unpack_nibbles(weights.qweight, k)
    if weights.group_index is not None:
        codes = codes.index_select(1, group_order(weights.group_index))
    padded = codes.new_zeros(panels * INT8_PANEL, chunks * INT4_CHUNK)
    padded[:n, :k] = codes
    # Dimensions are named as in the drawing; the nibbles of a word come last, lowest first.
    if weight_only:
        parts = padded.view(panels, 2, 8, chunks, 2, 4, 2, 4, 2)  # panel h g chunk unit j p t e
        nibbles = parts.permute(0, 3, 4, 2, 7, 5, 8, 6, 1)
    else:
        parts = padded.view(panels, 2, 8, chunks, 2, 4, 4, 4)  # panel h g chunk unit j t e
        nibbles = parts.permute(0, 3, 4, 2, 6, 5, *((7, 1) if weights.codebook is None else (1, 7)))
    nibbles = nibbles.reshape(panels, chunks, INT8_PANEL * INT4_CHUNK // 2, 2)
    body = nibbles[..., 0] | (nibbles[..., 1] << 4)

    scale, tables = _fragment_scale(weights, weight_only)
    zero = scale.new_tensor(8.0) if weights.zero_point is None else weights.zero_point.float()
    pairs = torch.stack(torch.broadcast_tensors(scale, zero), dim=2)  # [N, groups, 2]
    head = [_term_bytes(_units(weights, weight_only)[:, None], panels)[:, 0]]
    if tables is not None:
        rows = tables.new_zeros(panels * INT8_PANEL, INT4_LEVELS)
        rows[:n] = tables
        head.append(rows.view(torch.uint8).view(panels, INT8_PANEL * INT4_LEVELS * rows.element_size()))
    if weights.group_size == -1:
        head.append(_term_bytes(pairs[:, 0], panels, 2).flatten(1))
    else:
        per_chunk = INT4_CHUNK // weights.segment_size
        whole = pairs.new_zeros(n, chunks * per_chunk, 2)
        whole[:, : pairs.shape[1]] = pairs
        terms = _term_bytes(whole.flatten(1), panels, 2)
        body = torch.cat((body, terms.reshape(panels, chunks, per_chunk * terms.shape[2])), dim=2)
    return torch.cat((*head, body.flatten(1)), dim=1).view(torch.int32)


def _units(weights: Int4Weights, weight_only: bool) -> Tensor:
    """Powers of two that outputs' codes are multiplied by before they are summed; float32 ``[N]``."""
    scale = weights.weight_scale.float().abs()
    if not weight_only or weights.codebook is not None or not scale.shape[1]:
        return torch.ones(scale.shape[0], dtype=torch.float32, device=scale.device)
    return _power_of_two(scale.amax(dim=1), -126, 100)


def _power_of_two(value: Tensor, least: int, most: int) -> Tensor:
    """The power of two at or below each float32, within 2^least … 2^most."""
    exponent = value.contiguous().view(torch.int32) & 0x7F800000
    return exponent.clamp((least + 127) << 23, (most + 127) << 23).view(torch.float32)


def _fragment_scale(weights: Int4Weights, weight_only: bool) -> tuple[Tensor, Tensor | None]:
    """Scales, float32 ``[N, groups]``, and tables ``[N, 16]`` of fragments."""
    scale, table = weights.weight_scale.float(), weights.codebook
    if table is None:
        return scale, None
    if not weight_only:
        scale, _, table = segment_terms(weights, False)
        if weights.group_size == -1:  # segments repeat it
            scale = scale[:, :1] if scale.shape[1] else weights.weight_scale.float()
        return scale, table
    unit = _power_of_two(table.abs().amax(dim=-1), -113, 118)
    scale = scale * (unit[:, None] if unit.dim() else unit)
    table = table * (1 / unit)[..., None]
    return scale, table.expand(weights.out_features, INT4_LEVELS)


def _term_bytes(values: Tensor, panels: int, each: int = 1) -> Tensor:
    """``[N, S * each]`` as uint8 ``[panels, S, bytes]``: per segment 16 outputs, ``each`` of every one."""
    n, width = values.shape
    padded = values.new_zeros(panels * INT8_PANEL, width)
    padded[:n] = values
    rows = padded.view(panels, INT8_PANEL, width // each, each).transpose(1, 2).contiguous()
    return rows.view(torch.uint8).view(panels, width // each, INT8_PANEL * each * values.element_size())
