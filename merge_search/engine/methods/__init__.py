"""The formulas of merging methods: measures, selections, splices, operators, allocation."""
