"""The search of merge coefficients against scores."""
