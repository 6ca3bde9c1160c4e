"""Base, experts, live model and coefficient maps, kept in memory between candidates."""
