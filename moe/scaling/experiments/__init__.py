"""Plans sweeps over models, reads the table of their runs, and chooses the best model."""
