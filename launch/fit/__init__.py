"""Fits scaling laws to tables of runs and predicts from them: python -m launch.fit --help."""
