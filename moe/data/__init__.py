"""From text to batches: sources (TFDS), tokenizers, packing, prepared rows, loader (Grain). Import
the modules themselves.
"""
