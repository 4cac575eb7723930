"""Puts documents of tokens into rows of one length, and rows into the fields of a batch."""
