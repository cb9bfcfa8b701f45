"""The artifact: the folder that `save` writes, how it is written, read, verified, and taken apart.

folder       save and load
writing      a stored joint model as files; describing, smallfiles, card, picture and shares are its parts
reading      tensors back, checked against the manifest; recorded, layout and tensorfiles are its parts
manifest     what an artifact says of itself
amending     members added and removed in place
verify       is it what was written, and how far is each member from its origin (comparing)
resident     members that run as they are stored
export       one member taken out
"""

from surgery.artifact.folder import load, save

__all__ = ["load", "save"]
