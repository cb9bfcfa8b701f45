"""Permission: whose Python code may run, as one value that is denied by default.

Code is imported in two places alone, `origins.factory.find_function` and
`origins.transformers_classes.remote_class`; both ask this value. A reference that the user types, or a recipe of the
user's own, may name the user's own functions. Text that came with an artifact may name nothing but functions that ship
with this package, and nothing that lies outside of the artifact is opened because of it. Everything else takes the
user's consent, `trust_remote_code`.
"""

from __future__ import annotations

from enum import IntEnum

import surgery_recipes  # pyright: ignore[reportMissingImports]

from surgery.errors import ConsentError

SHIPPED: frozenset[str] = surgery_recipes.SHIPPED
"""Functions that an artifact may name without consent, as `package.module:function`."""

PLACES: frozenset[str] = surgery_recipes.PLACES
"""Options of these functions that name a file or folder of the user's own."""


class Permission(IntEnum):
    """What may run or be opened because a text names it; each level includes those before it.

    Attributes:
        NONE: what ships with this package. The text came with an artifact.
        OWN: the functions and files that the text names. The user wrote it.
        ALL: Python files that come with a checkpoint or an artifact, too. The user consented.

    Example:
        >>> Permission.NONE < Permission.OWN < Permission.ALL
        True
        >>> Permission.of_user(trust_remote_code=False).name, Permission.of_artifact(False).name
        ('OWN', 'NONE')
    """

    NONE = 0
    OWN = 1
    ALL = 2

    @classmethod
    def of_user(cls, trust_remote_code: bool) -> Permission:
        """The permission of a reference or a recipe that the user wrote."""
        return cls.ALL if trust_remote_code else cls.OWN

    @classmethod
    def of_artifact(cls, trust_remote_code: bool) -> Permission:
        """The permission of text that came with an artifact."""
        return cls.ALL if trust_remote_code else cls.NONE

    def require(self, least: Permission, what: str) -> None:
        """Go on if this permission is at least `least`.

        Args:
            least: the permission that `what` needs.
            what: a sentence without its full stop that says what would happen, such as
                `"building member 'a' runs models.py:net"`.

        Raises:
            ConsentError: naming what would have happened.
        """
        if self < least:
            raise ConsentError(f"{what}: read it first, then consent with `trust_remote_code`")
