"""The one exception that means "the input is wrong, and here is what to change"."""

_SHOWN = 80  # characters of what is wrong


class InputError(ValueError):
    """Bad input: one sentence that names the argument, what was expected and what came.

    The command line prints it without a traceback and ends with exit code 2.
    """


def one_line(error: object) -> str:
    """What an exception of a library, or anything from a file, says: as part of a sentence."""
    return " ".join(str(error).split())[:200]


def shown(value: object) -> str:
    """What came, as part of a sentence: its `repr`, of a long one the beginning."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """A text, of a long one the beginning."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
