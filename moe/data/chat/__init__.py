"""Turns conversations into tokens through a Jinja template, with the answers as targets."""
