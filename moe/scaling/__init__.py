"""Counts what a model costs: parameters, floating-point operations, and what chips can do."""
