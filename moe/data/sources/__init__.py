"""Finds documents: data sets of TFDS, and the standard library's text as one of them."""
