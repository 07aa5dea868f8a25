"""Packing of sequences that share prefixes into one row: every shared token goes through the model once."""

from gcpo.scoring.tree import BudgetError, PrefixForest, TreePack

__all__ = ["BudgetError", "PrefixForest", "TreePack"]
