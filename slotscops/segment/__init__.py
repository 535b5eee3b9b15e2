"""Photos in, parts out."""
