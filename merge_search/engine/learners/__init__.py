"""Coefficient learners: they differentiate through the merge and hand back plain numbers."""
