"""``lissom.Int4`` and ``lissom.BlockSparse``: what they accept, resolve and refuse, and their plain forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lissom import BlockSparse, Int4, Int8
from lissom.config import KINDS, Config, from_dict, to_dict


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_group_sizes(group_size: int) -> None:
    assert Int4(group_size=group_size).group_size == group_size


@pytest.mark.parametrize("row", [None, "row", -1])
def test_names_of_a_whole_row(row: Any) -> None:
    assert Int4(group_size=row) == Int4(group_size=-1)


def test_codebook_scope_is_resolved() -> None:
    assert Int4().codebook_scope is None
    assert Int4(codebook="nf4").codebook_scope == "tensor"
    assert Int4(codebook="kmeans").codebook_scope == "channel"
    assert Int4(codebook="kmeans", codebook_scope="group").codebook_scope == "group"
    assert Int4(codebook="nf4", symmetric=True).codebook == "nf4", "symmetric means nothing there"


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"group_size": 100}, ValueError, r"group_size=100 cannot be; use 32, 64, 128, or -1 for one group"),
        ({"group_size": 0}, ValueError, r"group_size=0 cannot be"),
        ({"group_size": True}, ValueError, r"group_size=True cannot be"),
        ({"group_size": 64.0}, ValueError, r"group_size=64\.0 cannot be"),
        ({"group_size": "64"}, ValueError, r"group_size='64' cannot be"),
        ({"symmetric": 1}, TypeError, r"symmetric=1 must be True or False"),
        ({"codebook": "nf3"}, ValueError, r"codebook='nf3' is unknown; use one of None, 'nf4', 'kmeans'"),
        (
            {"codebook": "nf4", "codebook_scope": "group"},
            ValueError,
            r"codebook_scope='group' has no meaning with ",
        ),
        (
            {"codebook_scope": "group"},
            ValueError,
            r"codebook_scope='group' has no meaning with codebook=None; leave",
        ),
        (
            {"codebook": "kmeans", "codebook_scope": "row"},
            ValueError,
            r"codebook_scope='row' is unknown; use one",
        ),
        ({"method": "gptq"}, ValueError, r"method='gptq' is unknown; use one of 'hqq', 'mse', 'rtn'"),
        ({"activation": "dynamic"}, ValueError, r"activation='dynamic' is unknown; use one of 'int8', None"),
        ({"rotation": "yes"}, ValueError, r"rotation='yes' is unknown"),
        (
            {"rotation": True, "activation": None},
            ValueError,
            r"rotation=True has no use with activation=None",
        ),
        ({"embeddings": True}, ValueError, r"embeddings=True is unknown; use one of 'int8', 'int4', None"),
        ({"prefer": "accuracy"}, ValueError, r"prefer='accuracy' is unknown; use one of 'speed', 'size'"),
    ],
    ids=str,
)
def test_what_cannot_be(fields: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^Int4: {text}"):
        Int4(**fields)


@pytest.mark.parametrize(
    "config",
    [
        Int4(),
        Int4(32, symmetric=True, method="rtn", embeddings="int4", prefer="size"),
        Int4(codebook="nf4", activation=None, embeddings=None),
        Int4(-1, codebook="kmeans", codebook_scope="tensor", rotation=False),
        Int8(),
        BlockSparse(),
        BlockSparse(0.5, (16, 4), dtype="int8", method="wanda", scope="global", prefer="size"),
    ],
    ids=str,
)
def test_plain_form(config: Config) -> None:
    plain = json.loads(json.dumps(to_dict(config)))
    assert KINDS[plain["kind"]] is type(config)
    assert from_dict(plain) == config
    with pytest.raises(ValueError, match=rf"recipe: unknown key 'bits' for {plain['kind']}; known keys: "):
        from_dict({**plain, "bits": 4})
    with pytest.raises(ValueError, match=r"kind='int3' is unknown; .* 'int8', 'int4', 'block_sparse'"):
        from_dict({**plain, "kind": "int3"})


def test_is_frozen_and_hashable() -> None:
    assert len({Int4(), Int4(group_size=128), Int4(codebook="nf4")}) == 2
    with pytest.raises(AttributeError):
        Int4().group_size = 32  # type: ignore[misc]


# ---- BlockSparse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1), [8, 1]])
def test_block_shapes(shape: Any) -> None:
    assert BlockSparse(block_shape=shape) == BlockSparse(block_shape=(8, 1))
    assert BlockSparse().block_shape == "auto"
    assert BlockSparse(block_shape=(3, 5)).block_shape == (3, 5), "any shape works"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 must lie in \[0, 1\)"),
        ({"sparsity": 1}, r"sparsity=1 must lie in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity=-0\.1 must lie in"),
        ({"sparsity": float("nan")}, r"sparsity=nan must lie in"),
        ({"sparsity": True}, r"sparsity=True must lie in"),
        ({"sparsity": "80%"}, r"sparsity='80%' must lie in .*; 0\.8 is usual"),
        ({"block_shape": 8}, r"block_shape=8 must be two positive integers \(outputs, inputs\), such as"),
        ({"block_shape": (8,)}, r"block_shape=\(8,\) must be two"),
        ({"block_shape": (8, 0)}, r"block_shape=\(8, 0\) must be two"),
        ({"block_shape": (8, 1.0)}, r"block_shape=\(8, 1\.0\) must be two"),
        ({"block_shape": (True, 1)}, r"block_shape=\(True, 1\) must be two"),
        ({"block_shape": "8x1"}, r"block_shape='8x1' must be two .* or 'auto'"),
        (
            {"dtype": "float64"},
            r"dtype='float64' is unknown; use one of 'float32', 'bfloat16', 'float16', 'int8'",
        ),
        ({"method": "taylor"}, r"method='taylor' is unknown; use one of 'l2', 'l1', 'wanda'"),
        ({"scope": "layer"}, r"scope='layer' is unknown; use one of 'uniform', 'global'"),
        ({"prefer": "accuracy"}, r"prefer='accuracy' is unknown"),
    ],
    ids=str,
)
def test_what_block_sparse_cannot_be(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^BlockSparse: {text}"):
        BlockSparse(**fields)


def test_block_sparse_is_hashable() -> None:
    assert len({BlockSparse(), BlockSparse(0.8), BlockSparse(block_shape=(8, 1))}) == 2
