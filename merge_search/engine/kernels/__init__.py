"""Small exact functions that the formulas are built from."""
