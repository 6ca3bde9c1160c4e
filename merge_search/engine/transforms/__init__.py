"""Transforms: other models in place of a recipe's models, written before the merge. Rows are in `rules.transforms`."""

from __future__ import annotations
