"""Reads mergekit's YAML files into recipes and writes recipes as such files.

    recipe = read_mergekit(Path("merge.yml"))
    text = to_mergekit(recipe, groups)

Torch-free; nothing of mergekit is imported. docs/mergekit.md says how closely the two programs agree.
"""

from merge_search.mergekit.read import read_mergekit
from merge_search.mergekit.write import to_mergekit

__all__ = ["read_mergekit", "to_mergekit"]
