"""Lets transformers load what this package writes and transformers does not know. Importing this module does that.

    import merge_search.models
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("exported/")

The code is this package's. A folder brings none, and none of its files is run.
"""

from __future__ import annotations

from merge_search.engine.architectures import SMILE, register

__all__ = ["SMILE"]

register()
