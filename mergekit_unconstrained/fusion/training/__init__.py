"""The pivot, trained on gold tokens and fused targets."""
