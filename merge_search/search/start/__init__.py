"""The points that a study tries first: baselines, the best of earlier studies, fitted coefficients."""
