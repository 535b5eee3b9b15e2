"""Scores runs and baselines on the same photos and shows them in one table."""
