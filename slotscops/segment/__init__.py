"""Finds the parts in photos with a trained model."""
