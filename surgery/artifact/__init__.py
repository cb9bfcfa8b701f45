"""The artifact: the folder that `save` writes, how it is written, read, verified, and taken apart.

folder       save and load
writing      a stored joint model as files; tensorfiles, card, picture, shares and trim are its parts
reading      tensors back, checked against the manifest; recorded, layout and states are its parts
manifest     what an artifact says of itself
verify       is it what was written, and how far is each member from its origin
export       one member taken out
"""

from surgery.artifact.folder import load, save

__all__ = ["load", "save"]
