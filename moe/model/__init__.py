"""Holds the Transformer and its parts. Import the modules themselves."""
