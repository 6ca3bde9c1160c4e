"""One compiled loop from a traced element-wise function."""
