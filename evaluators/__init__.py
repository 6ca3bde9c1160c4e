"""What counts as good: one file a family. Importing this package loads nothing heavy."""

from __future__ import annotations

__all__ = ["CATALOGUE"]

CATALOGUE = {
    "classification": "evaluators.classification:Classification",
    "drift": "evaluators.drift:Drift",
    "latency": "evaluators.latency:Latency",
    "lm_eval": "evaluators.lm_eval:LmEval",
    "size": "evaluators.size:Size",
}
"""Name in a study file -> ``"module:Class"``."""
