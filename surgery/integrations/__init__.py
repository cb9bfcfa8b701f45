"""What other libraries know of this package, a file for each of them.

transformers  `from_pretrained` of a checkpoint whose codes are surgery's
arrival       registered when a library is imported, whichever of the two is imported first
"""
