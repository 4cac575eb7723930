"""Holds the Hopper kernels of the grouped matmuls: see swiglu.py for what calls them."""
