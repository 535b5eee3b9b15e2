"""A run on disk: its folder, its checkpoints and its page; and a model published without its run."""
