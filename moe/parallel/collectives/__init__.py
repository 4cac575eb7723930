"""Holds what devices send one another for weights, experts and the vocabulary."""
