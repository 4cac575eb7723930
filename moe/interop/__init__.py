"""Parameter trees from other models."""
