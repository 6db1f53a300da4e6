"""A source's distributions at the pivot's positions."""
