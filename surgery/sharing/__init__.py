"""Ways of sharing weights, one file each; a method is a few pure functions on blocks.

siblings   rows along the principal directions of sites that resemble one another, with precision by energy
subspaces  a bank of K hypermodules fitted to all blocks by subspace clustering
"""
