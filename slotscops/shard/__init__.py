"""Writes records into indexed tar files and reads them back by index."""
