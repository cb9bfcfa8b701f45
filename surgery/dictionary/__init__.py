"""The dictionary: rows and codes that generate blocks, and the mathematics of every way of sharing."""
