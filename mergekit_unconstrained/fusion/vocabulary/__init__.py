"""Tokenizers as tables of bytes, and maps from one vocabulary to another."""
