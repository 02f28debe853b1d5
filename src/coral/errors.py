"""The one exception a user is meant to read."""


class CoralError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The command line exits with 2."""


def first_line(error: Exception) -> str:
    """What an error of others says first, to go on behind."""
    return str(error).strip().split("\n")[0].rstrip(".")
