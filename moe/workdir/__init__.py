"""What a run keeps in its directory: checkpoints, their identity, and metrics."""
