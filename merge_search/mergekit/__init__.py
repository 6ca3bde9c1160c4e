"""mergekit's YAML files, read into recipes and written from them: interoperability by file format.

    recipe = read_mergekit(Path("merge.yml"))
    text = to_mergekit(recipe, groups)

Torch-free; nothing of mergekit is imported. docs/mergekit.md says how closely the two programs agree.
"""

from merge_search.mergekit.read import read_mergekit
from merge_search.mergekit.write import to_mergekit

__all__ = ["read_mergekit", "to_mergekit"]
