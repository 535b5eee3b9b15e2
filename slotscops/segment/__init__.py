"""Finds the parts in photos with a trained model, and exports or publishes such a model."""
