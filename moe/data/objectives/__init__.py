"""Turns prepared rows into examples of an objective, drawn anew for each example."""
