"""Runs and baselines in one table."""
