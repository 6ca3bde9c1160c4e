"""What the families of search spaces are built from."""
