"""Nouns and tools that every room uses."""
