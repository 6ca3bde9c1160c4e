"""What a study found, read from its storage alone."""
