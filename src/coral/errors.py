"""The one exception a user is meant to read."""


class CoralError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The command line exits with 2."""
