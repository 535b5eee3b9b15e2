"""Recommends a number of parts from short trainings, without any part label."""
