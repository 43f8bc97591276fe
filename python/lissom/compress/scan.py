"""Which modules a parent's code reads by ``self.child.weight`` instead of calling them.

A compressed layer's ``weight`` is dequantized anew on each access, so such a read stays right but is slow.
This scan reads source code, so it needs no example inputs; what it cannot see (other spellings, code without
source) the tracing pass sees on real inputs.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

__all__ = ["read_directly"]


def read_directly(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose ``weight`` is read in the ``forward`` of another module, and where."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        cls: Any = type(parent)
        for path in _weight_reads(cls):
            child = _resolve(parent, path)
            if child is not None and not _is_harmless(parent, path):
                read = f"self.{'.'.join(path)}.weight"
                where = f"{type(parent).__name__}.forward reads {read} instead of calling it"
                found.setdefault(child, where)
    return found


def _resolve(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _is_harmless(parent: nn.Module, path: tuple[str, ...]) -> bool:
    """True for reads on a branch that this parent never takes."""
    if isinstance(parent, nn.TransformerEncoderLayer) and path[0] in ("linear1", "linear2"):
        return not _may_take_fast_path(parent)
    return False


def _may_take_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether the layer's own conditions allow its fused inference kernel, which reads all weights.

    The conditions are those that ``nn.TransformerEncoderLayer.forward`` checks and that cannot change from
    one call to the next.
    """
    attention = layer.self_attn
    return bool(
        attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
    )


@cache
def _weight_reads(cls: Any) -> tuple[tuple[str, ...], ...]:
    """Attribute paths ``a.b`` for each ``self.a.b.weight`` read in ``forward`` or in a method it calls."""
    paths: dict[tuple[str, ...], None] = {}
    pending, done = ["forward"], set()
    while pending:
        name = pending.pop()
        done.add(name)
        tree = _source_tree(getattr(cls, name, None))
        for path in _attribute_paths(tree) if tree is not None else ():
            if len(path) == 1 and path[0] not in done and inspect.isfunction(getattr(cls, path[0], None)):
                pending.append(path[0])
            elif len(path) >= 2 and path[-1] == "weight":
                paths[path[:-1]] = None
    return tuple(paths)


def _source_tree(function: object) -> ast.AST | None:
    if not inspect.isfunction(function):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, IndentationError):  # built in a notebook, by exec, or in C
        return None


def _attribute_paths(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Every ``self.a.b.c`` that is read, as ``("a", "b", "c")``; its prefixes come too."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        names: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == "self":
            yield tuple(reversed(names))
