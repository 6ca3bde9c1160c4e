"""What may vary: one family a file. Reached by name (``space: {type: NAME}``), not by import."""

CATALOGUE = {
    "compatibility": "search_spaces.compatibility:Compatibility",
}
