"""Reads shards and the feature cache and makes batches of them."""
