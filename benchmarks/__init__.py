"""Measurements beside peers, or beside what cannot be avoided; each script prints a table."""
