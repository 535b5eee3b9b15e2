"""Records become indexed tar files, and are read back by index."""
