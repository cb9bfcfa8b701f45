"""Errors that a user can mend: each says what was required, what was found and what to do.

The command line prints the sentence alone and exits with code 2; anything that is not a `SurgeryError` is a
fault of this package and keeps its traceback.
"""

LONGEST = 4000  # characters of an error: it is read on a screen


class SurgeryError(Exception):
    """Base of every error that bad input, and not a fault of this package, causes.

    A message that would fill screens, as one that quotes a hostile file might, loses its middle.

    A message names a setting in backquotes, with its value where it asks for one: `budget`, `resume=True`. The command
    line puts flags in their place.
    """

    def __init__(self, *arguments: object):
        super().__init__(*(_within(each) if isinstance(each, str) else each for each in arguments))


class LoadError(SurgeryError):
    """A reference names no model, or its files cannot be read or do not fit the architecture."""


class ConsentError(LoadError):
    """Code or a file that an artifact or a checkpoint names would be used without the user's consent."""


class TraceError(SurgeryError):
    """A model could not be traced with the example inputs at hand."""


class PlanError(SurgeryError):
    """What was asked for cannot be met: a budget, a block shape, a site that does not exist."""


class ArtifactError(SurgeryError):
    """An artifact's files are missing, damaged, or do not match its manifest."""


class OutputError(SurgeryError):
    """A target cannot be written: it exists, is read-only, or the disk is full."""


class ExportError(SurgeryError):
    """A member has no plain form: a module of it was replaced by one that no ordinary module equals."""


class TrainingError(SurgeryError):
    """Training cannot go on: a loss is not finite, memory ran out, or a checkpoint belongs to another run."""


def _within(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    end = LONGEST // 4
    start = LONGEST - end - 60  # room for the words in between
    left_out = f" ... ({len(text) - start - end:,} characters are left out) ... "
    return f"{text[:start]}{left_out}{text[-end:]}"
