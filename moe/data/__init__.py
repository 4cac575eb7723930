"""Turns text into batches: sources (TFDS), tokenizers, packing, prepared rows, loader (Grain)."""
