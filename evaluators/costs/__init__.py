"""Costs of a merge: drift from the base, latency, share of changed parameters."""
