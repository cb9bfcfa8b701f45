"""Recipes that are installed with surgery: each YAML file here is a complete merge, for `surgery merge
--config NAME`."""
