"""The training loop, with checkpoints, monitors and failure handling."""
