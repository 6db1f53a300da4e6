"""Conversations: read, rendered by each model's template, encoded, cut alike for all models."""
