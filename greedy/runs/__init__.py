"""A run directory: its records, its choices, and what its disk has room for."""
