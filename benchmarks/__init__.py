"""Benchmarks: each module is run by `python -m benchmarks.<name>` and prints one table."""
