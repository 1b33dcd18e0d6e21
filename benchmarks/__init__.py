"""Measurements beside peers, or beside what cannot be avoided; each a script that prints a table."""
