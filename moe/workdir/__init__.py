"""Keeps what a run has in its directory: checkpoints, their identity, and metrics."""
