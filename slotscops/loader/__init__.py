"""Shards and feature cache become batches."""
