"""The built-in evaluators, one folder or file a family. Importing this package loads nothing heavy."""

from __future__ import annotations

__all__ = ["CATALOGUE"]

CATALOGUE = {
    "classification": "evaluators.classification.evaluator:Classification",
    "drift": "evaluators.costs.drift:Drift",
    "image_classification": "evaluators.classification.images:ImageClassification",
    "latency": "evaluators.costs.latency:Latency",
    "lm_eval": "evaluators.lm_eval.evaluator:LmEval",
    "ranking": "evaluators.ranking.evaluator:Ranking",
    "self_param": "evaluators.self_param:SelfParam",
    "size": "evaluators.costs.size:Size",
}
"""Name in a study file -> ``"module:Class"``."""
