"""placeholder."""


def demo() -> None:
    """Placeholder."""


EXAMPLES = "surgery x"
