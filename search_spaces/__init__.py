"""The built-in search spaces, one family a file. Studies name them (``space: {type: NAME}``); nothing imports them.

A name with ``@`` is a key of ``space`` that every family has. Its class is built around the family.
"""

CATALOGUE = {
    "blockwise": "search_spaces.blockwise:Blockwise",
    "compatibility": "search_spaces.compatibility:Compatibility",
    "depth_curve": "search_spaces.depth_curve:DepthCurve",
    "df_merge": "search_spaces.df_merge:DfMerge",
    "expert_choice": "search_spaces.expert_choice:ExpertChoice",
    "lowrank": "search_spaces.lowrank:LowRank",
    "mergekit_genome": "search_spaces.mergekit_genome:MergekitGenome",
    "module_kind": "search_spaces.module_kind:ModuleKind",
    "uniform": "search_spaces.uniform:Uniform",
    "@transform": "search_spaces.transformed:Transformed",
}
