"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input. The message is one clear line; the command line prints it without a traceback."""
