"""Siblings: sites of related members as sums of shared rows along principal directions."""
