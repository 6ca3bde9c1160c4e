"""Published merging methods as settings of one pipeline: a few lines each, not a class each.

    >>> from merge_search.recipe import Models
    >>> models = Models(base="models/base", experts={"maths": "models/maths", "code": "models/code"})
    >>> preset("ties", models, densities=0.2).select.kind
    'top_k'

Each preset names its paper and says where released code differs from it. Its `grid` lists values that were published or
are usual: a caller who tunes presets without a search tries these, as the opponents in ``benchmarks/search`` do.
torch-free.
"""

from merge_search.presets.recipes import PRESETS, add_preset, preset, preset_options
from merge_search.presets.row import Preset

__all__ = ["PRESETS", "Preset", "add_preset", "preset", "preset_options"]
