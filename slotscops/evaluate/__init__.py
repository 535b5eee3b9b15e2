"""Scores runs and baselines and shows them in one table."""
