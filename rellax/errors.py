"""The one exception that means "the input is wrong, and here is what to change"."""


class InputError(ValueError):
    """Bad input: one sentence that names the argument, what was expected and what came.

    The command line prints it without a traceback and ends with exit code 2.
    """


def one_line(error: object) -> str:
    """What an exception of a library, or anything from a file, says: as part of a sentence."""
    return " ".join(str(error).split())[:200]
