"""Templates: the layers of stacks as mixtures of a few (compositional models)."""
