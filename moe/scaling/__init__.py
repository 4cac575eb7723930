"""Counts what models and their layouts cost, and holds the rules and laws of experiments."""
