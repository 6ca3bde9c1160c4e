"""Scores a merge on lm-eval tasks."""
