"""Learned routes: which components a task uses, at which depth and how much."""
