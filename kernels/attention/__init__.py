"""Attention kernels: plain functions of arrays, and what they share."""
