"""Choosing 4-bit weights without data.

``choose_int4`` turns a weight into an :class:`~lissom.formats.Int4Weights` as a config asks. The functions
it is made of work on *groups*, float32 ``[R, n]``: every row is one group, and all rows are handled at once.
Weights are taken some rows at a time, so that a few times 16 MiB of memory are needed beside the layer,
whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import formats
from .config import Int4
from .formats import INT4_ZERO, Int4Weights

__all__ = [
    "NF4",
    "choose_int4",
    "half_quadratic",
    "kmeans_tables",
    "least_squares_clip",
    "round_to_nearest",
    "table_scale",
]

LEVELS = 16
CHUNK = 1 << 22
"""Weights that are worked on at once."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to ±1, with an exact zero (Dettmers et al., "QLoRA", 2023)."""

Uniform = tuple[Tensor, Tensor | None]
"""Scale ``[R, 1]`` and zero-point ``[R, 1]``, or None where it is 8: ``w ≈ (q - zero) * scale``."""


# ---- uniform values --------------------------------------------------------------------------------------


def round_to_nearest(groups: Tensor, symmetric: bool) -> Uniform:
    """The range of each group spread over the 16 codes.

    Symmetric: 15 steps over ±absmax, as GPTQ's quantizer has it (Frantar et al., 2022). Otherwise: 15 steps
    from the least to the largest weight, zero included.
    """
    if symmetric:
        return groups.abs().amax(1, keepdim=True) / 7.5, None
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (LEVELS - 1)
    return scale, -low * _inverse(scale)


def least_squares_clip(groups: Tensor, symmetric: bool) -> Uniform:
    """Least squared error: ranges shrunk by 0.5 … 1.05, each followed by least-squares fits of scale and
    zero-point to the codes that it gives; the best is fitted a few times more.

    The search is that of Banner et al., "Post training 4-bit quantization", 2019, and of OMSE (Choukroun et
    al., 2019), done numerically. Symmetric scales are tried with both signs, because code 0 reaches further
    (-8) than code 15 (+7).
    """
    scale, zero = round_to_nearest(groups, symmetric)
    best = _Best(groups)
    for shrink in (1.05, 0.98, 0.91, 0.84, 0.77, 0.7, 0.6, 0.5):
        if zero is None:
            candidates: list[Uniform] = [(scale * shrink, None), (scale * -shrink, None)]
        else:  # the upper end shrinks as much as the lower, or more, or less
            low, high = -zero * scale, (LEVELS - 1 - zero) * scale
            spans = [high * (shrink + tilt) - low * shrink for tilt in (-0.15, 0.0, 0.15)]
            candidates = [(s / (LEVELS - 1), -low * shrink * _inverse(s) * (LEVELS - 1)) for s in spans]
        for candidate in candidates:
            for _ in range(2):
                candidate = _fit(groups, candidate)
            best.offer(candidate)
    for _ in range(4):
        best.offer(_fit(groups, best.uniform))
    return best.uniform


def half_quadratic(groups: Tensor, symmetric: bool) -> Uniform:
    """HQQ: least l_p error, p = 0.7, which minds the many small errors and forgives outliers.

    Half-quadratic splitting (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning
    Models", 2023): an error variable takes what a generalised soft threshold leaves of
    ``w - (q - zero) * scale``, then the parameters are fitted to the rest. Here by least squares, zero-point
    *and* scale (the paper moves the zero-point alone; with ``symmetric`` the scale alone is left to move). It
    begins at :func:`least_squares_clip`, and errors count in steps of the grid, so that the threshold means
    the same for every group.
    """
    p, beta, growth = 0.7, 4.0, 1.15
    uniform = least_squares_clip(groups, symmetric)
    best = _Best(groups, p)
    best.offer(uniform)
    for _ in range(12):
        step = uniform[0].abs()
        error = (groups - _dequantize(groups, uniform)) * _inverse(step)
        size = error.abs()
        kept = error.sign() * (size - size.clamp(min=1e-3).pow(p - 1) / beta).clamp(min=0)
        uniform = _fit(groups, uniform, target=groups - kept * step)
        best.offer(uniform)
        beta *= growth
    return best.uniform


class _Best:
    """Keeps, group by group, the parameters with the least error: sum of |w - ŵ|^p."""

    def __init__(self, groups: Tensor, p: float = 2.0) -> None:
        self._groups, self._p = groups, p
        self._error: Tensor | None = None

    def offer(self, candidate: Uniform) -> None:
        distance = (self._groups - _dequantize(self._groups, candidate)).abs()
        error = (distance.square() if self._p == 2 else distance.pow(self._p)).sum(1, keepdim=True)
        if self._error is None:
            self._error, self.uniform = error, candidate
            return
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        scale, zero = (
            None if new is None or old is None else torch.where(better, new, old)
            for new, old in zip(candidate, self.uniform, strict=True)
        )
        assert scale is not None
        self.uniform = scale, zero


def _fit(groups: Tensor, uniform: Uniform, target: Tensor | None = None) -> Uniform:
    """Scale and zero-point of least squared error to ``target`` (the groups) for the codes that ``uniform``
    gives. A zero-point stays within the codes; a group whose codes are all the same keeps what it has."""
    scale, zero = uniform
    codes, target = _codes(groups, uniform), groups if target is None else target
    if zero is None:
        q = codes - INT4_ZERO
        power = q.square().sum(1, keepdim=True)
        fitted = (q * target).sum(1, keepdim=True) * _inverse(power)
        return torch.where(fitted != 0, fitted, scale), None
    q_mean, mean = codes.mean(1, keepdim=True), target.mean(1, keepdim=True)
    q = codes - q_mean
    fitted = (q * target).sum(1, keepdim=True) * _inverse(q.square().sum(1, keepdim=True))
    usable = fitted > 0
    moved = (q_mean - mean * _inverse(fitted)).clamp(0, LEVELS - 1)
    return torch.where(usable, fitted, scale), torch.where(usable, moved, zero)


def _codes(groups: Tensor, uniform: Uniform) -> Tensor:
    scale, zero = uniform
    return torch.round(groups * _inverse(scale) + (INT4_ZERO if zero is None else zero)).clamp_(0, LEVELS - 1)


def _dequantize(groups: Tensor, uniform: Uniform) -> Tensor:
    scale, zero = uniform
    return (_codes(groups, uniform) - (INT4_ZERO if zero is None else zero)) * scale


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


# ---- tables ----------------------------------------------------------------------------------------------


def table_scale(groups: Tensor, table: Tensor, start: Tensor | None = None) -> Tensor:
    """Scale ``[R, 1]`` of least squared error for values ``table * scale``.

    Args:
        groups: ``[R, n]``.
        table: ``[R, 16]`` or ``[1, 16]``, ascending.
        start: ``[R, 1]``, another scale to begin at.

    Tries that, and absmax scales shrunk by 0.7 … 1 with both signs, each followed by a least-squares fit.
    """
    absmax = groups.abs().amax(1, keepdim=True) * _inverse(table.abs().amax(1, keepdim=True))
    shrinks = (0.9, 0.8, 0.7)
    best = absmax if start is None else start
    error = torch.full_like(best, torch.inf)
    for candidate in (best, absmax, -absmax, *(absmax * s for s in shrinks), *(absmax * -s for s in shrinks)):
        scale = candidate
        for _ in range(2):
            wrong = (groups - _look_up(groups, scale, table)).square().sum(1, keepdim=True)
            best, error = torch.where(wrong < error, scale, best), torch.minimum(wrong, error)
            scale = _fit_table(groups, scale, table)
    return best


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry: ``values`` [R, n], ``table`` [R or 1, 16] ascending → int64 [R, n]."""
    middle = (table[:, 1:] + table[:, :-1]) / 2
    if len(table) == 1:
        return torch.bucketize(values, middle[0])
    return torch.searchsorted(middle.contiguous(), values.contiguous())


def _look_up(groups: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    index = _nearest(groups * _inverse(scale), table)
    return table.expand(len(groups), -1).gather(1, index) * scale


def _fit_table(groups: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    value = table.expand(len(groups), -1).gather(1, _nearest(groups * _inverse(scale), table))
    fitted = (value * groups).sum(1, keepdim=True) * _inverse(value.square().sum(1, keepdim=True))
    return torch.where(fitted != 0, fitted, scale)


def kmeans_tables(values: Tensor, weight: Tensor | None = None, iterations: int = 12) -> Tensor:
    """Tables of least squared error: one-dimensional k-means with 16 clusters for every row at once.

    Lloyd's algorithm ("Least squares quantization in PCM", 1982), begun halfway between quantiles and even
    spacing. A cluster that nothing belongs to moves to the value that is farthest from its entry, so none is
    lost; rows with at most 16 distinct values are represented exactly. Weight sharing by k-means: Han et al.,
    "Deep Compression", 2016.

    Args:
        values: ``[R, n]``.
        weight: how much each value counts, ``[R, n]``, or None.
        iterations: of Lloyd's algorithm.

    Returns:
        ``[R, 16]``, ascending.
    """
    rows, n = values.shape
    if rows == 0 or n == 0:
        return values.new_zeros(rows, LEVELS)
    ordered = values.sort(dim=1).values
    part = (torch.arange(LEVELS, device=values.device) + 0.5) / LEVELS
    even = ordered[:, :1] + (ordered[:, -1:] - ordered[:, :1]) * part
    table = (ordered[:, (part * n).long()] + even) / 2
    weight = torch.ones_like(values) if weight is None else weight
    spread = min(LEVELS, n)
    for _ in range(iterations):
        index = _nearest(values, table)
        mass = torch.zeros_like(table).scatter_add_(1, index, weight)
        total = torch.zeros_like(table).scatter_add_(1, index, weight * values)
        table = torch.where(mass > 0, total / mass.clamp(min=1e-30), table)
        empty = mass == 0
        if bool(empty.any()):
            distance = (values - table.gather(1, index)).abs()
            far = values.gather(1, distance.topk(spread, dim=1).indices)
            turn = (empty.cumsum(1) - 1).clamp(
                0, spread - 1
            )  # the first empty one takes the farthest value, …
            table = torch.where(empty, far.gather(1, turn), table)
        table = table.sort(dim=1).values
    # At most 16 distinct values: they are the table.
    changes = torch.cat((torch.zeros_like(ordered[:, :1]), (ordered.diff(dim=1) != 0).to(ordered)), dim=1)
    rank = changes.cumsum(1).long()
    few = rank[:, -1:] < LEVELS
    exact = ordered[:, -1:].repeat(1, LEVELS).scatter(1, rank.clamp(max=LEVELS - 1), ordered)
    return torch.where(few, exact, table)


def _on_int8_grid(table: Tensor) -> Tensor:
    """Entries ``[..., 16]`` rounded as the int8 form of the kernel rounds them, so that weights are chosen
    for what will be computed."""
    rows = table.reshape(-1, LEVELS)
    return formats.dequantize_int8(*formats.quantize_int8(rows)).reshape(table.shape)


# ---- a whole weight --------------------------------------------------------------------------------------


def choose_int4(weight: Tensor, config: Int4) -> Int4Weights:
    """4-bit weights as ``config`` asks (``group_size``, ``symmetric``, ``method``, ``codebook``).

    Scales are stored in float16 where all of them are normal numbers there, else in float32; zero-points in
    float16. Codes are chosen for the parameters as stored.

    Args:
        weight: ``[N, K]``, any floating dtype, finite; already rotated if it is to be.

    Raises:
        ValueError: NaN or infinity in ``weight`` (the row is named), or not two-dimensional.
    """
    if weight.dim() != 2:
        raise ValueError(f"choose_int4: weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    weight = weight.detach()
    bad = ~torch.isfinite(weight).all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"choose_int4: weight row {int(bad.nonzero()[0])} holds NaN or infinity ({int(bad.sum())} such "
            "rows); repair the checkpoint before compressing it"
        )
    return (_choose_uniform if config.codebook is None else _choose_table)(weight, config)


_METHODS: dict[str, Callable[[Tensor, bool], Uniform]] = {
    "rtn": round_to_nearest,
    "mse": least_squares_clip,
    "hqq": half_quadratic,
}


def _choose_uniform(weight: Tensor, config: Int4) -> Int4Weights:
    n, k = weight.shape
    groups = formats.int4_groups(k, config.group_size)
    scale = torch.zeros(n, groups, device=weight.device)
    zero = None if config.symmetric else torch.full_like(scale, INT4_ZERO)
    for part, columns, at in _pieces(weight, config.group_size):
        found = _METHODS[config.method](part, config.symmetric)
        for stored, value in zip((scale, zero), found, strict=True):
            if stored is not None and value is not None:
                stored[at, columns] = value.view(stored[at, columns].shape)
    scale = _storable(scale)
    zero = None if zero is None else zero.half()
    codes = torch.zeros(n, k, dtype=torch.uint8, device=weight.device)
    for part, columns, at in _pieces(weight, config.group_size):
        stored_zero = None if zero is None else zero[at, columns].float().reshape(-1, 1)
        q = _codes(part, (scale[at, columns].float().reshape(-1, 1), stored_zero))
        _put(codes, q, columns, at, config.group_size)
    return Int4Weights(formats.pack_nibbles(codes), scale, zero, in_features=k, group_size=config.group_size)


def _choose_table(weight: Tensor, config: Int4) -> Int4Weights:
    n, k = weight.shape
    norm = _norms(weight, config)
    table = _tables(weight, norm, config)  # [1 or N, 1 or G, 16]
    if config.activation is not None:
        table = _on_int8_grid(table)
    scale = torch.zeros(n, formats.int4_groups(k, config.group_size), device=weight.device)
    for part, columns, at in _pieces(weight, config.group_size):
        start = norm[at, columns].reshape(-1, 1)
        found = table_scale(part, _tables_of(table, at, columns), start)
        scale[at, columns] = found.view(-1, columns.stop - columns.start)
    scale = _storable(scale)
    codes = torch.zeros(n, k, dtype=torch.uint8, device=weight.device)
    for part, columns, at in _pieces(weight, config.group_size):
        values = part * _inverse(scale[at, columns].float().reshape(-1, 1))
        _put(codes, _nearest(values, _tables_of(table, at, columns)), columns, at, config.group_size)
    shapes: dict[str | None, tuple[int, ...]] = {"tensor": (), "channel": (n,), "group": tuple(scale.shape)}
    return Int4Weights(
        formats.pack_nibbles(codes),
        scale,
        codebook=table.reshape(*shapes[config.codebook_scope], LEVELS),
        in_features=k,
        group_size=config.group_size,
    )


def _norms(weight: Tensor, config: Int4) -> Tensor:
    """What the groups are divided by before they share a table, ``[N, G]``: absmax. But 1 where all that
    share a table have at most 16 distinct weights together: those are the table then."""
    n, k = weight.shape
    norm = torch.zeros(n, formats.int4_groups(k, config.group_size), device=weight.device)
    for part, columns, at in _pieces(weight, config.group_size):
        absmax = part.abs().amax(1, keepdim=True)
        if config.codebook_scope == "group":
            absmax = torch.where(_few(part), torch.ones_like(absmax), absmax)
        norm[at, columns] = absmax.view(-1, columns.stop - columns.start)
    if config.codebook_scope == "channel":
        for at in _row_chunks(weight):
            few = _few(weight[at].float())
            norm[at] = torch.where(few, torch.ones_like(norm[at]), norm[at])
    elif config.codebook == "kmeans" and config.codebook_scope == "tensor" and len(weight.unique()) <= LEVELS:
        norm = torch.ones_like(norm)
    return norm


def _few(values: Tensor) -> Tensor:
    """Whether a row has at most 16 distinct values, bool ``[R, 1]``."""
    changes = values.sort(dim=1).values.diff(dim=1) != 0
    return changes.sum(1, keepdim=True) < LEVELS


def _tables(weight: Tensor, norm: Tensor, config: Int4) -> Tensor:
    if config.codebook == "nf4":
        return torch.tensor(NF4, device=weight.device).view(1, 1, LEVELS)
    n, k = weight.shape
    width = k if config.group_size == -1 else config.group_size
    scope = config.codebook_scope
    if scope == "group":
        table = torch.zeros(*norm.shape, LEVELS, device=weight.device)
        for part, columns, at in _pieces(weight, config.group_size):
            values = part * _inverse(norm[at, columns].reshape(-1, 1))
            table[at, columns] = kmeans_tables(values).view(-1, columns.stop - columns.start, LEVELS)
        return table

    def normal(at: slice) -> Tensor:
        return weight[at].float() * _inverse(norm[at]).repeat_interleave(max(width, 1), dim=1)[:, :k]

    if scope == "channel":
        table = torch.zeros(n, 1, LEVELS, device=weight.device)
        for at in _row_chunks(weight):
            # A value counts as much as its error will: times the square of its group's scale.
            share = norm[at].square().repeat_interleave(max(width, 1), dim=1)[:, :k]
            table[at, 0] = kmeans_tables(normal(at), share.clamp(min=1e-30))
        return table
    # One table for all: at most a million values, evenly taken, say enough about 16 clusters.
    rows = [normal(at).flatten() for at in _row_chunks(weight)]
    values = torch.cat(rows) if rows else weight.new_zeros(0)
    few = bool((norm == 1).all()) and len(weight.unique()) <= LEVELS
    values = values.unique() if few else values[:: max(1, len(values) >> 20)]
    return kmeans_tables(values.view(1, -1)).view(1, 1, LEVELS)


def _tables_of(table: Tensor, at: slice, columns: slice) -> Tensor:
    """The tables of a piece's groups: ``[R, 16]``, or ``[1, 16]`` where all share one."""
    if table.shape[:2] == (1, 1):
        return table.view(1, LEVELS)
    own = table[at] if table.shape[1] == 1 else table[at, columns]
    return own.expand(-1, columns.stop - columns.start, -1).reshape(-1, LEVELS)


# ---- rows and groups -------------------------------------------------------------------------------------


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    n, k = weight.shape
    rows = max(1, CHUNK // max(k, 1))
    for begin in range(0, n, rows):
        yield slice(begin, min(n, begin + rows))


def _pieces(weight: Tensor, group_size: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Groups of the same size, some rows at a time: (float32 ``[rows * groups, size]``, groups, rows)."""
    k = weight.shape[1]
    size = k if group_size == -1 else group_size
    whole = k // size if size else 0
    for at in _row_chunks(weight):
        rows = weight[at].float()
        if whole:
            yield rows[:, : whole * size].reshape(-1, size), slice(0, whole), at
        if size and k > whole * size:
            yield rows[:, whole * size :], slice(whole, whole + 1), at


def _put(codes: Tensor, q: Tensor, columns: slice, at: slice, group_size: int) -> None:
    """Write the codes of a piece to where it came from."""
    begin = columns.start * max(group_size, 0)
    values = q.to(torch.uint8).view(at.stop - at.start, -1)
    codes[at, begin : begin + values.shape[1]] = values


def _storable(scale: Tensor) -> Tensor:
    """float16 where every scale is zero or a normal number there, else float32."""
    size = scale[scale != 0].abs()
    limits = torch.finfo(torch.float16)
    fits = size.numel() == 0 or bool((size.amin() >= limits.tiny) & (size.amax() <= limits.max))
    return scale.half() if fits else scale
