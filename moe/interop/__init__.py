"""Makes parameter trees from those of other models."""
