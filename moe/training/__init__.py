"""Holds the state of a run, its steps, and the loop over them."""
