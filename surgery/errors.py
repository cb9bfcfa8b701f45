"""Errors that a user can mend: each says what was required, what was found and what to do.

The command line prints the sentence alone and exits with code 2; anything that is not a `SurgeryError` is a
fault of this package and keeps its traceback.
"""


class SurgeryError(Exception):
    """Base of every error that bad input, and not a fault of this package, causes."""


class LoadError(SurgeryError):
    """A reference names no model, or its files cannot be read or do not fit the architecture."""


class TraceError(SurgeryError):
    """A model could not be traced with the example inputs at hand."""


class PlanError(SurgeryError):
    """What was asked for cannot be met: a budget, a block shape, a site that does not exist."""


class ArtifactError(SurgeryError):
    """An artifact's files are missing, damaged, or do not match its manifest."""


class OutputError(SurgeryError):
    """A target cannot be written: it exists, is read-only, or the disk is full."""


class TrainingError(SurgeryError):
    """Training cannot go on: a loss is not finite, memory ran out, or a checkpoint belongs to another run."""
