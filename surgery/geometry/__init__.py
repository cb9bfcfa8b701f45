"""Tensors as stacks of matrices, matrices as blocks, and where each element of a block lies."""
