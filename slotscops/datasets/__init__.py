"""Reads annotated photos, photo folders and toy photos from disk and makes records of them."""
