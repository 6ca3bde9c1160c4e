"""The evaluator that scores a merge on tasks of lm-eval."""
