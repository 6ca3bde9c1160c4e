"""What stays in memory between candidates: base, experts, the live model, coefficient maps."""
