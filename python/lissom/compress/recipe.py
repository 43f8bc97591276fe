"""Recipes: one config for the whole model, or module-name patterns with a config each.

A recipe is either a config (``Int8(...)``, ``Int4(...)``, ``BlockSparse(...)``) or a mapping from a glob on
dotted module names (``"encoder.layer.*.output.dense"``, ``fnmatch`` rules, ``*`` crosses dots) to a config,
or to None for "leave alone". The first pattern that matches a module decides.

The plain form, for YAML, JSON and ``lissom.json``, is either a config's dict (``{"kind": "int8", …}``) or
``{"modules": {pattern: {"kind": "int8", …} or null}}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from .. import config as configs
from ..config import BlockSparse, Config, Int4, Int8

__all__ = [
    "NAMED_RECIPES",
    "Config",
    "Recipe",
    "check_recipe",
    "load_recipe",
    "match",
    "recipe_from_dict",
    "recipe_to_dict",
]

Recipe: TypeAlias = Config | Mapping[str, Config | None]

NAMED_RECIPES: dict[str, Config] = {
    "int8": Int8(),
    "int8-size": Int8(prefer="size"),
    "int8-smooth": Int8(smooth=0.5),
    "int8-static": Int8(activation="static", calibration="percentile"),
    "int8-weight-only": Int8(activation=None, prefer="size"),
    "int4": Int4(),
    "int4-size": Int4(embeddings="int4", prefer="size"),
    "int4-nf4": Int4(codebook="nf4"),
    "int4-kmeans": Int4(codebook="kmeans"),
    "int4-weight-only": Int4(activation=None, prefer="size"),
    "sparse": BlockSparse(),
    "sparse-size": BlockSparse(prefer="size"),
    "sparse-int8": BlockSparse(dtype="int8"),
    "sparse-wanda": BlockSparse(method="wanda"),
    "sparse-global": BlockSparse(scope="global"),
}
"""What ``load_recipe`` knows by name."""

_CONFIG_TYPES = tuple(configs.KINDS.values())


def check_recipe(recipe: object) -> dict[str, Config | None]:
    """The recipe as a mapping from pattern to config (a single config stands for ``"*"``).

    Raises:
        TypeError: not a config and not a mapping from strings to configs.
        ValueError: an empty mapping.
    """
    if isinstance(recipe, _CONFIG_TYPES):
        return {"*": recipe}
    if not isinstance(recipe, Mapping):
        fix = "lissom.Int8() or a mapping such as {'encoder.*': lissom.Int8(), 'head': None}"
        if isinstance(recipe, str | os.PathLike):
            fix = f"lissom.compress.load_recipe({str(recipe)!r})"
        elif isinstance(recipe, type) and issubclass(recipe, _CONFIG_TYPES):
            fix = f"an instance, {recipe.__name__}()"
        raise TypeError(f"recipe={recipe!r} is a {type(recipe).__name__}; use {fix}")
    if not recipe:
        raise ValueError("recipe={} is empty; name at least one pattern, such as {'*': lissom.Int8()}")
    for pattern, config in recipe.items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"recipe: the pattern {pattern!r} is a {type(pattern).__name__}; use a string such as '*'"
            )
        if config is not None and not isinstance(config, _CONFIG_TYPES):
            raise TypeError(
                f"recipe: {pattern!r} maps to {config!r}, a {type(config).__name__}; use a config such as "
                "lissom.Int8(), or None to leave it alone (for plain dicts: lissom.compress.recipe_from_dict)"
            )
    return dict(recipe)


def match(recipe: Mapping[str, Config | None], name: str) -> tuple[str | None, Config | None]:
    """``(pattern, config)`` of the first pattern that matches ``name``; ``(None, None)`` if none does."""
    for pattern, config in recipe.items():
        if fnmatchcase(name, pattern):
            return pattern, config
    return None, None


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain form of a recipe (see the module's docstring); inverse of :func:`recipe_from_dict`."""
    checked = check_recipe(recipe)
    if isinstance(recipe, _CONFIG_TYPES):
        return _plain(configs.to_dict(recipe))
    return {"modules": {p: None if c is None else _plain(configs.to_dict(c)) for p, c in checked.items()}}


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as JSON would hold them."""
    result: dict[str, Any] = json.loads(json.dumps(data))
    return result


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Recipe from its plain form.

    Raises:
        TypeError, ValueError: an unknown kind or key (with the known ones), or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise TypeError(
            "recipe: expected a mapping such as {kind: int8} or {modules: {…}}, "
            f"got {type(data).__name__} {data!r}"
        )
    if "modules" not in data:
        return configs.from_dict(data)
    unknown = [key for key in data if key != "modules"]
    if unknown:
        raise ValueError(f"recipe: unknown key {unknown[0]!r} beside 'modules'; known keys: modules")
    modules = data["modules"]
    if not isinstance(modules, Mapping):
        raise TypeError(
            f"recipe: modules must map patterns to configs, got {type(modules).__name__} {modules!r}"
        )
    recipe: dict[str, Config | None] = {}
    for pattern, entry in modules.items():
        if entry is not None and not isinstance(entry, Mapping):
            raise TypeError(
                f"recipe: modules[{pattern!r}] must be a config such as {{kind: int8}} or null, got {entry!r}"
            )
        recipe[pattern] = None if entry is None else configs.from_dict(entry)
    return check_recipe(recipe)


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """A recipe by name (``NAMED_RECIPES``) or from a ``.yaml``, ``.yml`` or ``.json`` file.

    Raises:
        FileNotFoundError: neither a known name nor a file.
        ImportError: a YAML file, and pyyaml is not installed.
        TypeError, ValueError: the file holds no valid recipe; the message names the file and the key.
    """
    name = os.fspath(name_or_path)
    if name in NAMED_RECIPES:
        return NAMED_RECIPES[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(NAMED_RECIPES)
        raise FileNotFoundError(f"recipe {name!r} is neither a file nor one of the known names: {known}")
    suffix = path.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"recipe {name!r}: the suffix {suffix!r} is unknown; use .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if suffix == ".json" else _load_yaml(text)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"recipe {name!r} cannot be read: {error}") from error
    try:
        return recipe_from_dict(data)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _load_yaml(text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "a YAML recipe needs pyyaml: pip install 'lissom[cli]', or write it as JSON"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
