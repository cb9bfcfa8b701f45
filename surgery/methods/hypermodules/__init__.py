"""Hypermodules: basis blocks that any locations may use, and the evolution of which uses which (MUiR)."""
