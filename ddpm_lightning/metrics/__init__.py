"""Judging images: features, distances, and the record that a number stands on."""
