"""The one exception a user is meant to read."""


class CoralError(ValueError):
    """Bad input: the message says in one sentence what is wrong, where, and what to do. The CLI exits with 2."""
