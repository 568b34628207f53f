"""The one exception type for everything that a user can cause.

Tools print its message on one line and exit with status 2; library users can catch it.
"""


class UserError(Exception):
    """Bad input or configuration; the message says what was expected, what came and what to do."""
