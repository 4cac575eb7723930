"""Counts what models cost, plans sweeps over them, and fits scaling laws to the runs."""
