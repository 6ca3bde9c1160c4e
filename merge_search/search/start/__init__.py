"""What a study tries first: baselines, earlier studies, fitted coefficients."""
