"""Writes records into indexed tar files, reads them back by index, and shows what they contain."""
