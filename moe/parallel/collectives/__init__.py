"""Holds what devices send one another for weights, experts, the vocabulary and copies."""
