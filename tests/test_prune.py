"""Choosing blocks: what they are worth, and how many and which are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lissom import BlockSparse, prune
from lissom.prune import block_scores, block_sizes, choose_blocks, keep_best, keep_globally

SHAPES = [((16, 12), (8, 1)), ((17, 13), (8, 4)), ((5, 3), (8, 4)), ((9, 7), (1, 1)), ((12, 33), (3, 5))]


def slow_scores(weight: Tensor, block_shape: tuple[int, int], method: str, norm: Tensor | None) -> Tensor:
    """Block by block, as the docstring has it."""
    (n, k), (height, width) = weight.shape, block_shape
    scores = torch.empty(-(-n // height), -(-k // width))
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            columns = slice(j * width, (j + 1) * width)
            block = weight[i * height : (i + 1) * height, columns].double()
            if norm is not None:
                block = block * norm[columns].double()
            scores[i, j] = block.abs().mean() if method == "l1" else block.square().mean().sqrt()
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["l1", "l2", "wanda"])
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_scores(
    shape: tuple[int, int], block: Any, method: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "CHUNK", 40)  # several passes
    weight = torch.randn(shape).to(dtype)
    norm = torch.rand(shape[1]) if method == "wanda" else None
    scores = block_scores(weight, block, method, norm)
    torch.testing.assert_close(scores, slow_scores(weight, block, method, norm))
    sizes = block_sizes(shape, block)
    assert sizes.shape == scores.shape
    assert int(sizes.sum()) == shape[0] * shape[1]


def test_scores_of_weights_whose_squares_overflow() -> None:
    scores = block_scores(torch.tensor([[1e30, 1e-30]]), (1, 1))
    torch.testing.assert_close(scores, torch.tensor([[1e30, 1e-30]]))


def test_an_edge_block_is_judged_by_what_it_holds() -> None:
    scores = block_scores(torch.ones(9, 5), (8, 4), "l2")
    assert torch.equal(scores, torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_no_weights_no_blocks(shape: tuple[int, int]) -> None:
    mask = choose_blocks(torch.empty(shape), BlockSparse(block_shape=(8, 4)))
    assert mask.shape == (-(-shape[0] // 8), -(-shape[1] // 4))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.7, 0.8, 0.99, 0.9999])
def test_how_many_and_which(sparsity: float, ties: bool, by_row: bool) -> None:
    scores = torch.rand(7, 100)
    if ties:
        scores = (scores * 4).round()
    kept = keep_best(scores, sparsity, by_row)
    groups = [(scores[i], kept[i]) for i in range(7)] if by_row else [(scores.flatten(), kept.flatten())]
    for values, mask in groups:
        count = values.numel()
        dropped = min(round(sparsity * count * 1000) // 1000, count - 1)
        assert int(mask.sum()) == count - dropped
        best = sorted(range(count), key=lambda i: (-float(values[i]), i))[: count - dropped]
        assert mask.nonzero().flatten().tolist() == sorted(best)


def test_of_equal_blocks_the_first_are_kept() -> None:
    kept = keep_best(torch.zeros(3, 4), 0.5)
    assert kept.flatten().tolist() == [True] * 6 + [False] * 6
    assert keep_best(torch.zeros(3, 4), 0.5, by_row=True).tolist() == [[True, True, False, False]] * 3


def test_methods_choose_differently() -> None:
    weight = torch.tensor([[3.0, 0.0, 2.0, 2.0]])
    both = [choose_blocks(weight, BlockSparse(0.5, (1, 2), method=m)) for m in ("l1", "l2")]  # type: ignore[arg-type]
    assert [m.tolist() for m in both] == [[[False, True]], [[True, False]]]
    norm = torch.tensor([0.0, 1.0, 1.0, 1.0])
    wanda = choose_blocks(weight, BlockSparse(0.5, (1, 1), method="wanda"), activation_norm=norm)
    assert wanda.tolist() == [[False, False, True, True]]


def test_wanda_compares_inside_rows_of_blocks() -> None:
    weight = torch.cat((torch.full((8, 6), 100.0), torch.ones(8, 6))) * torch.arange(1.0, 7.0)
    config = BlockSparse(0.5, (8, 1), method="wanda")
    mask = choose_blocks(weight, config, activation_norm=torch.ones(6))
    assert mask.tolist() == [[False] * 3 + [True] * 3] * 2
    assert choose_blocks(weight, BlockSparse(0.5, (8, 1))).tolist() == [[True] * 6, [False] * 6]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95])
def test_one_threshold_for_all(sparsity: float) -> None:
    weights = [torch.randn(33, 20), torch.randn(16, 64) * 3, torch.randn(37, 19).pow(5) * 0.1]
    blocks = [(8, 1), (8, 4), (3, 2)]
    scores = [block_scores(w, b) for w, b in zip(weights, blocks, strict=True)]
    sizes = [block_sizes((w.shape[0], w.shape[1]), b) for w, b in zip(weights, blocks, strict=True)]
    masks = keep_globally(scores, sizes, sparsity)
    assert [m.shape for m in masks] == [s.shape for s in scores]
    total = sum(w.numel() for w in weights)
    dropped = sum(int(size[~mask].sum()) for size, mask in zip(sizes, masks, strict=True))
    assert sparsity * total - 32 < dropped <= sparsity * total
    for score, mask in zip(scores, masks, strict=True):
        assert bool(mask.any())
        if not bool(mask.all()):
            assert float(score[~mask].max()) <= float(score[mask].min())
    if sparsity == 0.8:
        assert float(masks[2].float().mean()) < 0.5 * float(masks[0].float().mean()), "its weight is in few"
    scaled = keep_globally([scores[0] * 1e-20, scores[1] * 1e20, scores[2]], sizes, sparsity)
    assert all(map(torch.equal, masks, scaled)), "only shares within a layer count"


def test_shares_are_those_of_the_paper() -> None:
    scores = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    shares = prune._shares(scores, torch.full((2, 2), 4))
    assert shares.tolist() == pytest.approx([1 / 4, 1 / 14 / 4, 4 / 13 / 4, 0])


def test_one_threshold_and_ties() -> None:
    masks = keep_globally([torch.ones(1, 4), torch.ones(2, 2)], [torch.ones(1, 4), torch.ones(2, 2)], 0.5)
    assert [m.flatten().tolist() for m in masks] == [[True, True, False, False]] * 2
    masks = keep_globally([torch.zeros(1, 4), torch.ones(2, 2)], [torch.ones(1, 4), torch.ones(2, 2)], 0.5)
    assert [m.flatten().tolist() for m in masks] == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = torch.ones(10, 4)
    weight[9, 1] = bad
    with pytest.raises(ValueError, match="weight row 9 holds NaN or infinity; repair the checkpoint"):
        choose_blocks(weight, BlockSparse(block_shape=(8, 1)))


@pytest.mark.parametrize(
    ("method", "norm", "text"),
    [
        (
            "wanda",
            None,
            r"method='wanda' and activation_norm do not fit: none was given; give it with method=",
        ),
        ("l2", torch.ones(4), r"method='l2' and activation_norm do not fit: one was given"),
        (
            "wanda",
            torch.ones(5),
            r"activation_norm must be floating point \[4\], one per input; got .* \(5,\)",
        ),
        ("wanda", torch.ones(4).int(), r"activation_norm must be floating point \[4\].*torch.int32"),
        ("wanda", torch.tensor([1, 1, -1.0, 1]), r"activation_norm\[2\] is -1\.0; norms must be finite and"),
        ("wanda", torch.tensor([1, float("nan"), 1, 1]), r"activation_norm\[1\] is nan"),
    ],
    ids=str,
)
def test_norms_that_do_not_fit(method: Any, norm: Tensor | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        block_scores(torch.ones(2, 4), (1, 1), method, norm)


def test_default_block_shape() -> None:
    assert prune.default_block_shape(BlockSparse()) == (8, 1)
    assert prune.default_block_shape(BlockSparse(dtype="int8")) == (8, 4)
    assert prune.default_block_shape(BlockSparse(block_shape=(3, 5))) == (3, 5)
