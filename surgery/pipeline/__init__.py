"""From a recipe to an artifact: merge, and train."""
