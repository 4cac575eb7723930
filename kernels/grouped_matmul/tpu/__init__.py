"""Computes the experts' SwiGLU on TPUs in four Pallas kernels.

`projections.py` multiplies rows by gate and up and applies the activation, `matmul.py` multiplies
by down (and by gate and up for the gradient of x), `hidden.py` goes back through down and the
activation, and `gradient.py` sums the gradients of the weights.

Each step of a grid takes one block of rows, which belongs to one expert. Which one is prefetched as
scalars, so that Pallas's pipeline fetches the operands of the next step while this one computes.
Blocks follow one another inside a tile of columns, and blocks of one expert are neighbours: the
pipeline fetches a weight's tile when the expert or the tile changes, and never otherwise.
"""
