"""The compressor: walks a model, chooses, calibrates, swaps, measures, reports."""

from .explain import Explanation, explain
from .pipeline import compress_
from .recipe import NAMED_RECIPES, Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from .report import LayerReport, Report, get_record, set_record

__all__ = [
    "NAMED_RECIPES",
    "Explanation",
    "LayerReport",
    "Recipe",
    "Report",
    "compress_",
    "explain",
    "get_record",
    "load_recipe",
    "recipe_from_dict",
    "recipe_to_dict",
    "set_record",
]
