"""Rows and codes: what every tensor is joined as, and what hypermodules, templates and siblings are stored as."""
