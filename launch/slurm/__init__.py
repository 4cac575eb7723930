"""Writes and submits SLURM jobs: python -m launch.slurm --help."""
