"""Choosing 4-bit weights without data.

``choose_int4`` turns a weight into an :class:`~lissom.formats.Int4Weights` as a config asks. The functions
it is made of work on *groups*, float32 ``[..., n]``: every run of n is one group, and all are handled at
once. Weights are taken some rows at a time, so that some 30 to 100 MiB are needed beside the layer and its
codes, whatever its size.

Which errors matter
-------------------
What counts is the error of the outputs, Σ_k δ[n, k] · x[k], and without data the inputs x are unknown. But a
layer whose inputs differ in size tends to have learnt weights of the opposite sizes. Input k is therefore
taken to have the power 1 / mean_n|w[n, k]|² (:func:`column_importance`): the one choice under which it does
not matter how much of a factor is in the weights and how much in whatever feeds them. (In MiniLM and MPNet
this is so for the two kinds of layers, value and intermediate, whose errors do most harm.) Clip search, HQQ
and k-means weigh errors by it.

Rotated weights are combinations of 16 inputs, and errors of the 16 can cancel on the inputs that matter:
:func:`coordinate_descent` finds such codes. At the same size of the errors, MiniLM's and MPNet's embeddings
then lose a quarter to a third less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import formats
from .config import Int4
from .formats import INT4_ZERO, ROTATION_BLOCK, Int4Weights

__all__ = [
    "NF4",
    "choose_int4",
    "column_importance",
    "coordinate_descent",
    "half_quadratic",
    "kmeans_tables",
    "least_squares_clip",
    "round_to_nearest",
    "table_scale",
]

LEVELS = 16
CHUNK = 1 << 20
"""Weights that are worked on at once: 4 MiB of float32."""

SAMPLE = 1 << 20
"""Values that a table for a whole tensor is learnt from."""

IMPORTANCE_RANGE = 16.0
"""Largest importance of a column, in units of the one of average weights: inputs that are hardly used must
not decide everything."""

SWEEPS = 3
"""Rounds of :func:`coordinate_descent`."""

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
"""Scale ``[..., 1]`` and zero-point ``[..., 1]``, or None where it is 8: ``w ≈ (q - zero) * scale``."""


# ---- importance ------------------------------------------------------------------------------------------


def column_importance(weight: Tensor, rotated: bool = False) -> Tensor:
    """How much the square of an error in each column counts: 1 / mean|w|², see the top of this file.

    Mean magnitudes and not mean squares: one outlier says little about its column. Bounded to [0, 16] times
    the importance of average weights.

    Args:
        weight: ``[N, K]``.
        rotated: it was rotated (``formats.rotate``); the importance is that of the columns before.

    Returns:
        float32 ``[K]``.
    """
    size = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for at in _row_chunks(weight):
        rows = weight[at].float()
        rows = formats.rotate(rows, 1 / ROTATION_BLOCK) if rotated else rows
        size += rows.abs().sum(0, dtype=torch.float64)
    relative = size / size.mean().clamp(min=1e-300)
    return relative.clamp(min=IMPORTANCE_RANGE**-0.5).pow(-2).float()


def coordinate_descent(
    weight: Tensor, importance: Tensor, nearest: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Codes of rotated weights whose errors cancel, as far as they can, on the inputs that matter.

    In a block of 16 the squared error of the outputs is δ·P·δᵀ, P = H·diag(importance)·H, H the Hadamard
    matrix of ``formats.rotate``. Code after code is set to the best one for what the other 15 are, three
    times around; at first those still to come count as exact. A further round, a refit of scales and
    zero-points to the codes, or GPTQ's error feedback (Frantar et al., 2022) first, gain 1 % or nothing.

    Source: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023, with this
    importance in place of measured inputs; here for all rows and blocks at once.

    Args:
        weight: rotated, float32 ``[N, B, 16]``.
        importance: of the inputs before rotation, positive, ``[B, 16]``.
        nearest: gives the codes of a column ``[N, B]`` of all blocks and the values that they stand for.

    Returns:
        Codes ``[N, B, 16]``, dtype as ``nearest`` gives them.
    """
    product = _rotated_diagonal(importance)
    pull = product / product.diagonal(dim1=1, dim2=2)[..., None]
    pull.diagonal(dim1=1, dim2=2).zero_()
    columns = weight.permute(2, 0, 1).contiguous()
    errors = torch.zeros_like(columns)
    codes: dict[int, Tensor] = {}
    for j in [*range(ROTATION_BLOCK)] * SWEEPS:
        best = columns[j] + (errors * pull[:, j].t()[:, None]).sum(0)
        codes[j], value = nearest(best)
        errors[j] = columns[j] - value
    return torch.stack([codes[j] for j in range(ROTATION_BLOCK)], dim=-1)


def _rotated_diagonal(diagonal: Tensor) -> Tensor:
    """H·diag·H / 16 for every block: ``[B, 16]`` to ``[B, 16, 16]``."""
    return formats.rotate(formats.rotate(torch.diag_embed(diagonal)).mT, 1 / ROTATION_BLOCK)


# ---- uniform values --------------------------------------------------------------------------------------


def round_to_nearest(groups: Tensor, symmetric: bool, importance: Tensor | None = None) -> Uniform:
    """The range of each group spread over the 16 codes.

    Symmetric: 15 steps over ±absmax, as GPTQ's quantizer has it (Frantar et al., 2022); but a group of equal
    weights is exact. Otherwise: 15 steps from the least to the largest weight, zero included.
    ``importance`` is not used.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if symmetric:
        scale = torch.maximum(high, -low) / (LEVELS / 2 - 0.5)
        return torch.where(low == high, low / -INT4_ZERO, scale), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (LEVELS - 1)
    return scale, -low * _inverse(scale)


def least_squares_clip(groups: Tensor, symmetric: bool, importance: Tensor | None = None) -> Uniform:
    """Least squared error: ranges shrunk by 0.5 … 1.05, each followed by least-squares fits of scale and
    zero-point to the codes that it gives; the best is fitted a few times more. Never worse than
    :func:`round_to_nearest`.

    The search is that of Banner et al., "Post training 4-bit quantization", 2019, and of OMSE (Choukroun et
    al., 2019), done numerically. Symmetric scales are tried with both signs, because code 0 reaches further
    (-8) than code 15 (+7).

    Args:
        groups: ``[..., n]``.
        symmetric: without zero-points.
        importance: how much each squared error counts, broadcast to ``groups``; None is all alike.
    """
    scale, zero = start = round_to_nearest(groups, symmetric)
    sums = _Sums(groups, importance)
    best = _Best()
    best.offer(sums.error(sums.codes(start), start), start)
    for shrink in (1.05, 0.98, 0.91, 0.84, 0.77, 0.7, 0.6, 0.5):
        if zero is None:
            candidates: list[Uniform] = [(scale * shrink, None), (scale * -shrink, None)]
        else:  # the upper end shrinks as much as the lower, or more, or less
            low, high = -zero * scale, (LEVELS - 1 - zero) * scale
            spans = [high * (shrink + tilt) - low * shrink for tilt in (-0.15, 0.0, 0.15)]
            candidates = [(s / (LEVELS - 1), -low * shrink * _inverse(s) * (LEVELS - 1)) for s in spans]
        for candidate in candidates:
            fitted = sums.fit(sums.codes(candidate), candidate)
            codes = sums.codes(fitted)
            fitted = sums.fit(codes, fitted)
            best.offer(sums.error(codes, fitted), fitted)
    for _ in range(4):
        codes = sums.codes(best.uniform)
        fitted = sums.fit(codes, best.uniform)
        best.offer(sums.error(codes, fitted), fitted)
    return best.uniform


def half_quadratic(groups: Tensor, symmetric: bool, importance: Tensor | None = None) -> Uniform:
    """HQQ: least l_p error, p = 0.7, which minds the many small errors and forgives outliers.

    Half-quadratic splitting (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning
    Models", 2023): an error variable takes what a generalised soft threshold leaves of
    ``w - (q - zero) * scale``, then the parameters are fitted to the rest. Here by least squares, zero-point
    *and* scale (the paper moves the zero-point alone; with ``symmetric`` the scale alone is left to move). It
    begins at :func:`least_squares_clip` (the paper: at the full range, which ends worse), and errors count in
    steps of the grid, so that the threshold means the same for every group. Arguments as there.
    """
    p, beta, growth = 0.7, 4.0, 1.15
    uniform = least_squares_clip(groups, symmetric, importance)
    sums = _Sums(groups, importance)
    best = _Best()
    codes = sums.codes(uniform)
    for i in range(9):
        step = uniform[0].abs()
        error = (groups - _values(codes, uniform)).mul_(_inverse(step))
        size = error.abs().clamp_(min=1e-3)
        power = size.pow(p - 1)  # |error|^p = |error| · |error|^(p - 1)
        best.offer(_mean(size * power, importance) * step.pow(p), uniform)
        if i == 8:
            return best.uniform
        kept = error.sign() * (size - power / beta).clamp_(min=0)
        uniform = sums.fit(codes, uniform, target=groups - kept * step)
        codes = sums.codes(uniform)
        beta *= growth
    raise AssertionError


class _Best:
    """Keeps, group by group, the parameters with the least error."""

    def __init__(self) -> None:
        self._error: Tensor | None = None

    def offer(self, error: Tensor, candidate: Uniform) -> None:
        """``error`` like the scale of ``candidate``; NaN is not better than anything."""
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


class _Sums:
    """Fits of scale and zero-point to given codes, and their errors, by sums over each group."""

    def __init__(self, groups: Tensor, importance: Tensor | None) -> None:
        self._groups = groups
        self._share = None if importance is None else importance / importance.sum(-1, keepdim=True)
        self._mean = self._average(groups)
        self._power = self._average(groups.square())

    def _average(self, values: Tensor) -> Tensor:
        return _mean(values, self._share)

    def codes(self, uniform: Uniform) -> Tensor:
        return _codes(self._groups, uniform)

    def fit(self, codes: Tensor, uniform: Uniform, target: Tensor | None = None) -> Uniform:
        """Scale and zero-point of least squared error to ``target`` (the groups) for ``codes``. A zero-point
        stays within the codes; a group whose codes are all the same keeps what it has."""
        scale, zero = uniform
        target, mean = (self._groups, self._mean) if target is None else (target, self._average(target))
        if zero is None:
            q = codes - INT4_ZERO
            weighed = q if self._share is None else q * self._share
            fitted = (weighed * target).sum(-1, keepdim=True)
            fitted *= _inverse((weighed * q).sum(-1, keepdim=True))
            return torch.where(fitted != 0, fitted, scale), None
        q_mean = self._average(codes)
        q = codes - q_mean
        weighed = q if self._share is None else q * self._share
        fitted = (weighed * target).sum(-1, keepdim=True) * _inverse((weighed * q).sum(-1, keepdim=True))
        usable = fitted > 0
        moved = (q_mean - mean * _inverse(fitted)).clamp_(0, LEVELS - 1)
        return torch.where(usable, fitted, scale), torch.where(usable, moved, zero)

    def error(self, codes: Tensor, uniform: Uniform) -> Tensor:
        """Mean squared error of ``codes`` with these parameters, ``[..., 1]``."""
        return self._average((self._groups - _values(codes, uniform)).square_())


def _mean(values: Tensor, importance: Tensor | None) -> Tensor:
    """Weighted mean of each group, up to a factor that all groups of a place share."""
    return (
        values.mean(-1, keepdim=True) if importance is None else (values * importance).sum(-1, keepdim=True)
    )


def _codes(groups: Tensor, uniform: Uniform) -> Tensor:
    """Nearest codes, float32 0 … 15."""
    scale, zero = uniform
    scaled = groups * _inverse(scale)
    return scaled.add_(INT4_ZERO if zero is None else zero).round_().clamp_(0, LEVELS - 1)


def _values(codes: Tensor, uniform: Uniform) -> Tensor:
    scale, zero = uniform
    return (codes - (INT4_ZERO if zero is None else zero)).mul_(scale)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


# ---- tables ----------------------------------------------------------------------------------------------


def table_scale(
    groups: Tensor, table: Tensor, importance: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """Scale ``[..., 1]`` of least squared error for values ``table * scale``.

    Args:
        groups: ``[..., n]``.
        table: ``[16]``, or ``[..., 16]`` with the leading dimensions of ``groups``; ascending.
        importance: how much each squared error counts, broadcast to ``groups``; None is all alike.
        start: ``[..., 1]``, a scale to begin at and stay near. None: absmax scales shrunk by 0.6 … 1, with
            both signs (a table need not be symmetric).

    Each candidate's entries get a least-squares scale; the one of least error is fitted twice more.
    """
    if start is None:
        absmax = groups.abs().amax(-1, keepdim=True) * _inverse(table.abs().amax(-1, keepdim=True))
        shrinks = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
        candidates = [absmax * s for shrink in shrinks for s in (shrink, -shrink)]
    else:
        candidates = [start, start * 0.94, start * 1.06]

    def fit(scale: Tensor) -> tuple[Tensor, Tensor]:
        """The scale for the entries nearest with ``scale``, and by how much it lowers the squared error."""
        value = _look_up(groups * _inverse(scale), table)
        weighed = value if importance is None else value * importance
        product = (weighed * groups).sum(-1, keepdim=True)
        fitted = product * _inverse((weighed * value).sum(-1, keepdim=True))
        return torch.where(fitted != 0, fitted, scale), fitted * product

    best, gain = fit(candidates[0])
    for candidate in candidates[1:]:
        fitted, lowered = fit(candidate)
        best, gain = torch.where(lowered > gain, fitted, best), torch.maximum(lowered, gain)
    for _ in range(2):
        best, _ = fit(best)
    return best


def _middle(table: Tensor) -> Tensor:
    """What separates neighbouring entries, ``[..., 15]``."""
    return table[..., 1:] / 2 + table[..., :-1] / 2  # their sum could overflow


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry: ``values`` [..., n], ``table`` [16] or [..., 16] ascending → int64."""
    middle = _middle(table)
    if table.dim() == 1:
        return torch.bucketize(values, middle)
    return torch.searchsorted(middle.expand(*values.shape[:-1], -1).contiguous(), values.contiguous())


def _entries(index: Tensor, table: Tensor) -> Tensor:
    if table.dim() == 1:
        return table[index]
    return table.expand(*index.shape[:-1], -1).gather(-1, index)


def _look_up(values: Tensor, table: Tensor) -> Tensor:
    return _entries(_nearest(values, table), table)


def kmeans_tables(
    values: Tensor, weight: Tensor | None = None, table: Tensor | None = None, iterations: int = 12
) -> Tensor:
    """Tables of least squared error: one-dimensional k-means with 16 clusters for every row at once.

    Lloyd's algorithm ("Least squares quantization in PCM", 1982) on sorted values, where clusters are runs
    and their means differences of running sums. A cluster that nothing belongs to moves to the value that is
    farthest from its entry, so none is lost; rows with at most 16 distinct values are represented exactly.
    Weight sharing by k-means: Han et al., "Deep Compression", 2016.

    Args:
        values: ``[R, n]``.
        weight: how much each value counts, positive, ``[R, n]``, or None.
        table: ``[R, 16]`` to begin with; None is halfway between quantiles and even spacing.
        iterations: of Lloyd's algorithm.

    Returns:
        ``[R, 16]``, ascending.
    """
    rows, n = values.shape
    if rows == 0 or n == 0:
        return values.new_zeros(rows, LEVELS)
    ordered, order = values.sort(dim=1)
    weight = torch.ones_like(ordered) if weight is None else weight.gather(1, order)
    if table is None:
        part = (torch.arange(LEVELS, device=values.device) + 0.5) / LEVELS
        even = ordered[:, :1] + (ordered[:, -1:] - ordered[:, :1]) * part
        table = (ordered[:, (part * n).long()] + even) / 2
    start = torch.zeros(rows, 1, dtype=torch.float64, device=values.device)
    masses = torch.cat((start, weight.double().cumsum(1)), dim=1)
    totals = torch.cat((start, (weight.double() * ordered).cumsum(1)), dim=1)
    ends = torch.full((rows, 1), n, device=values.device)
    spread = min(LEVELS, n)
    for _ in range(iterations):
        edges = torch.searchsorted(ordered, _middle(table))
        edges = torch.cat((torch.zeros_like(ends), edges, ends), dim=1)
        mass, total = masses.gather(1, edges).diff(dim=1), totals.gather(1, edges).diff(dim=1)
        empty = edges.diff(dim=1) == 0
        table = torch.where(empty, table, (total / mass).float())
        if bool(empty.any()):
            distance = (ordered - _look_up(ordered, table)).abs_()
            far = ordered.gather(1, distance.topk(spread, dim=1).indices)
            # The first empty one takes the farthest value, the second the next, …
            turn = (empty.cumsum(1) - 1).clamp_(0, spread - 1)
            table = torch.where(empty, far.gather(1, turn), table)
        table = table.sort(dim=1).values
    # At most 16 distinct values: they are the table.
    rank = torch.nn.functional.pad((ordered.diff(dim=1) != 0).cumsum(1), (1, 0))
    few = rank[:, -1:] < LEVELS
    exact = ordered[:, -1:].repeat(1, LEVELS).scatter(1, rank.clamp(max=LEVELS - 1), ordered)
    return torch.where(few, exact, table)


def _on_int8_grid(table: Tensor) -> Tensor:
    """Entries ``[..., 16]`` rounded as the int8 form of the kernel rounds them, so that weights are chosen
    for what will be computed."""
    rows = table.reshape(-1, LEVELS)
    return formats.dequantize_int8(*formats.quantize_int8(rows)).reshape(table.shape)


# ---- a whole weight --------------------------------------------------------------------------------------


def choose_int4(weight: Tensor, config: Int4, *, embedding: bool = False) -> Int4Weights:
    """4-bit weights as ``config`` asks (``group_size``, ``symmetric``, ``method``, ``codebook``).

    Scales are stored in float16 where all of them are normal numbers there (or zero), else in float32;
    zero-points in float16, since whole numbers cost more accuracy than a byte per group saves. Codes are
    chosen for the parameters as stored. Groups whose largest magnitude is below about 1e-38 become zeros.

    Args:
        weight: ``[N, K]``, any floating dtype, finite; with ``config.rotation`` it is already rotated
            (``formats.rotate``).
        embedding: it is the table of an embedding: what counts is how close its rows come, every number
            alike, and they are never rotated, whatever ``config`` says.

    Raises:
        ValueError: NaN or infinity in ``weight`` (the row is named), or not two-dimensional.
    """
    if weight.dim() != 2:
        raise ValueError(f"choose_int4: weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    weight = weight.detach()
    bad = torch.cat(
        [~torch.isfinite(weight[at]).all(dim=1) for at in _row_chunks(weight)]
        or [weight.new_zeros(0, dtype=torch.bool)]
    )
    if bool(bad.any()):
        raise ValueError(
            f"choose_int4: weight row {int(bad.nonzero()[0])} holds NaN or infinity ({int(bad.sum())} such "
            "rows); repair the checkpoint before compressing it"
        )
    if embedding:
        config = replace(config, rotation=None)
    alike = embedding or config.method == "rtn"
    importance = None if alike else column_importance(weight, bool(config.rotation))
    return (_choose_uniform if config.codebook is None else _choose_table)(weight, config, importance)


_METHODS: dict[str, Callable[[Tensor, bool, Tensor | None], Uniform]] = {
    "rtn": round_to_nearest,
    "mse": least_squares_clip,
    "hqq": half_quadratic,
}

Nearest = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of weights ``[rows, C]``: codes and the values that they stand for."""


def _choose_uniform(weight: Tensor, config: Int4, importance: Tensor | None) -> Int4Weights:
    n, k = weight.shape
    scale = torch.zeros(n, formats.int4_groups(k, config.group_size), device=weight.device)
    zero = None if config.symmetric else torch.full_like(scale, INT4_ZERO)
    flat = None if config.rotation else importance  # a rotated column is a bit of all 16
    for at in _row_chunks(weight):
        for part, groups, columns in _split(weight[at].float(), config.group_size):
            unit = part.abs().amax(-1, keepdim=True)  # squares of what is left neither overflow nor vanish
            share = None if flat is None else flat[columns].view(part.shape[1:])
            found, found_zero = _METHODS[config.method](part * _inverse(unit), config.symmetric, share)
            scale[at, groups] = (found * unit)[..., 0]
            if zero is not None and found_zero is not None:
                zero[at, groups] = found_zero[..., 0]
    scale = _storable(scale, float(INT4_ZERO))
    zero = None if zero is None else zero.half()

    def nearest(at: slice, group_of: Tensor) -> Nearest:
        s = scale[at, group_of].float()
        uniform = s, None if zero is None else zero[at, group_of].float()

        def of(values: Tensor) -> tuple[Tensor, Tensor]:
            codes = _codes(values, uniform)
            return codes.to(torch.uint8), _values(codes, uniform)

        return of

    codes = _assign(weight, config, importance, nearest)
    return Int4Weights(codes, scale, zero, in_features=k, group_size=config.group_size)


def _assign(
    weight: Tensor, config: Int4, importance: Tensor | None, nearest: Callable[[slice, Tensor], Nearest]
) -> Tensor:
    """Packed codes of the whole weight: the nearest, or where it is rotated and importance is given, those of
    :func:`coordinate_descent`."""
    n, k = weight.shape
    group_of = _group_of(weight, config.group_size)
    whole = k // ROTATION_BLOCK * ROTATION_BLOCK if config.rotation and importance is not None else 0
    packed = torch.empty(n, (k + 1) // 2, dtype=torch.uint8, device=weight.device)
    for at in _row_chunks(weight):
        rows = weight[at].float()
        codes = [nearest(at, group_of[whole:])(rows[:, whole:])[0]]
        if whole and importance is not None:
            blocks = rows[:, :whole].unflatten(1, (-1, ROTATION_BLOCK))
            shares = importance[:whole].view(-1, ROTATION_BLOCK)
            found = coordinate_descent(blocks, shares, nearest(at, group_of[:whole:ROTATION_BLOCK]))
            codes.insert(0, found.flatten(1))
        packed[at] = formats.pack_nibbles(torch.cat(codes, dim=1))
    return packed


def _choose_table(weight: Tensor, config: Int4, importance: Tensor | None) -> Int4Weights:
    n, k = weight.shape
    size, scope = config.group_size, config.codebook_scope
    flat = None if config.rotation else importance
    shape = (n, formats.int4_groups(k, size))
    scale = torch.ones(shape, device=weight.device)
    shared = _shared_table(weight, config, flat)  # [16] for all, or None
    own = torch.zeros(*shape[: 2 if scope == "group" else 1], LEVELS, device=weight.device)
    for at in _row_chunks(weight):
        rows = weight[at].float()
        if shared is not None:
            scale[at] = _scales(rows, shared, config, flat)
        elif scope == "group":  # in units of the weights: there is nothing to share
            for part, groups, columns in _split(rows, size):
                share = None if flat is None else flat[columns].view(part.shape[1:]).expand_as(part)
                values = part.flatten(0, 1)
                table = kmeans_tables(values, None if share is None else share.flatten(0, 1))
                few = _few(values)
                own[at, groups] = torch.where(few, table, _on_int8_grid(table)).view(*part.shape[:2], LEVELS)
        else:
            table, found = _alternate(rows, config, flat, len(rows))
            table = _on_int8_grid(table)
            few = _few(rows)
            scale[at] = torch.where(few, scale[at], _scales(rows, table, config, flat, found))
            own[at] = torch.where(few, kmeans_tables(rows, iterations=0), table) if bool(few.any()) else table
    few_of_all = shared is not None and config.codebook == "kmeans" and _distinct(weight) is not None
    book = own if shared is None else shared
    scale = _storable(torch.ones_like(scale) if few_of_all or scope == "group" else scale, 1.0)

    def nearest(at: slice, group_of: Tensor) -> Nearest:
        s = scale[at, group_of].float()
        inverse = _inverse(s)

        def of(values: Tensor) -> tuple[Tensor, Tensor]:
            if scope == "group":  # a table for every value: count the thresholds below it
                tables = book[at, group_of]
                codes = (values[..., None] > _middle(tables)).sum(-1)
                return codes.to(torch.uint8), tables.gather(-1, codes[..., None])[..., 0]
            table = book if book.dim() == 1 else book[at]
            codes = _nearest(values * inverse, table)
            return codes.to(torch.uint8), _entries(codes, table) * s

        return of

    codes = _assign(weight, config, importance, nearest)
    return Int4Weights(codes, scale, codebook=book, in_features=k, group_size=size)


def _shared_table(weight: Tensor, config: Int4, importance: Tensor | None) -> Tensor | None:
    """The table ``[16]`` where there is one for all."""
    if config.codebook == "nf4":
        return torch.tensor(NF4, device=weight.device)
    if config.codebook_scope != "tensor":
        return None
    distinct = _distinct(weight)
    if distinct is not None:
        return kmeans_tables(distinct[None], iterations=0)[0]
    n, k = weight.shape
    # Rows evenly taken: many values say no more about 16 clusters than a million do.
    step = max(1, -(-n * k // SAMPLE))
    return _on_int8_grid(_alternate(weight[::step].float(), config, importance, 1)[0])[0]


def _alternate(rows: Tensor, config: Int4, importance: Tensor | None, tables: int) -> tuple[Tensor, Tensor]:
    """K-means tables ``[tables, 16]`` (one for all rows, or one for each) of rows divided by their groups'
    scales ``[rows, G]``, which are chosen for the tables, in turn."""
    group_of = _group_of(rows, config.group_size)
    absmax = [part.abs().amax(-1) for part, _, _ in _split(rows, config.group_size)]
    scale = torch.cat(absmax, dim=1) if absmax else rows.new_zeros(len(rows), 0)
    table: Tensor | None = None
    if not rows.numel():
        return rows.new_zeros(tables, LEVELS), scale
    for turn in range(1 if config.method == "rtn" else 3):
        if table is not None:
            scale = _scales(
                rows, table[0] if tables == 1 else table, config, importance, scale if turn > 1 else None
            )
        spread = scale[:, group_of]
        # A value counts as much as its error will: times the square of its group's scale.
        size = spread.abs().view(tables, -1)
        share = size * _inverse(size.amax(1, keepdim=True))
        weight = share.square_().clamp_(min=1e-12).view(rows.shape)
        weight = weight if importance is None else weight * importance
        values = rows * _inverse(spread)
        table = kmeans_tables(values.view(tables, -1), weight.view(tables, -1), table, 12 if turn == 0 else 6)
    assert table is not None
    return table, scale


def _scales(
    rows: Tensor, table: Tensor, config: Int4, importance: Tensor | None, start: Tensor | None = None
) -> Tensor:
    """Scales ``[rows, G]`` for a table ``[16]`` or ``[rows, 16]``: absmax (``"rtn"``) or searched."""
    scale = rows.new_zeros(len(rows), formats.int4_groups(rows.shape[1], config.group_size))
    for part, groups, columns in _split(rows, config.group_size):
        unit = part.abs().amax(-1, keepdim=True)
        if config.method == "rtn":
            top = table.gather(-1, table.abs().argmax(-1, keepdim=True))  # equal weights stay exact
            top = top if table.dim() == 1 else top[:, None]
            first = part[..., :1]
            same = (part == first).all(-1, keepdim=True)
            scale[:, groups] = (torch.where(same, first, unit * top.sign()) * _inverse(top))[..., 0]
            continue
        share = None if importance is None else importance[columns].view(part.shape[1:])
        begin = None if start is None else start[:, groups, None] * _inverse(unit)
        own = table if table.dim() == 1 else table[:, None]
        found = table_scale(part * _inverse(unit), own, share, begin) * unit
        largest = torch.finfo(torch.float32).max
        scale[:, groups] = found[..., 0].clamp(-largest, largest)
    return scale


def _few(values: Tensor) -> Tensor:
    """Whether a row has at most 16 distinct values, bool ``[R, 1]``."""
    changes = values.sort(dim=1).values.diff(dim=1) != 0
    return changes.sum(1, keepdim=True) < LEVELS


def _distinct(weight: Tensor) -> Tensor | None:
    """The distinct weights, float32 ``[≤ 16]``, or None where there are more."""
    found = weight.new_zeros(0).float()
    for at in _row_chunks(weight):
        found = torch.cat((found, weight[at].float().flatten())).unique()
        if len(found) > LEVELS:
            return None
    return found


# ---- rows and groups -------------------------------------------------------------------------------------


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    n, k = weight.shape
    rows = max(1, CHUNK // max(k, 1))
    for begin in range(0, n, rows):
        yield slice(begin, min(n, begin + rows))


def _group_of(weight: Tensor, group_size: int) -> Tensor:
    """int64 ``[K]``: the group of every column."""
    columns = torch.arange(weight.shape[1], device=weight.device)
    return columns * 0 if group_size == -1 else columns // group_size


def _split(rows: Tensor, group_size: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Groups of the same size: (``[rows, groups, size]``, which groups, which columns)."""
    k = rows.shape[1]
    size = k if group_size == -1 else group_size
    whole = k // size if size else 0
    end = whole * size
    if whole:
        yield rows[:, :end].unflatten(1, (whole, size)), slice(0, whole), slice(0, end)
    if size and k > end:
        yield rows[:, end:].unflatten(1, (1, k - end)), slice(whole, whole + 1), slice(end, k)


def _storable(scale: Tensor, largest: float) -> Tensor:
    """float16 where every scale is zero or a normal number there, else float32.

    ``largest``: magnitude that scales are multiplied by; none is left so large that this overflows.
    """
    limit = torch.finfo(torch.float32).max / max(1.0, largest)
    scale = scale.clamp(-limit, limit)
    size = scale[scale != 0].abs()
    limits = torch.finfo(torch.float16)
    fits = size.numel() == 0 or bool((size.amin() >= limits.tiny) & (size.amax() <= limits.max))
    return scale.half() if fits else scale
