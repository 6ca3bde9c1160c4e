"""Tables and model cards of a study, from its storage alone."""
