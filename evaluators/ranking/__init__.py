"""Scores a recommender that ranks items as the next one of a sequence."""
