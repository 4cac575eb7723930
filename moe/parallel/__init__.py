"""Holds the mesh, and the collectives over its axes. Import the modules themselves."""
