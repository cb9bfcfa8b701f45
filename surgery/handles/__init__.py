"""Tensors that are not there yet: what they are is known, and they are had when they are asked for."""
