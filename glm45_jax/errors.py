"""The one error that users are meant to read: it names the cause, the place and the remedy."""


class UserError(ValueError):
    """Bad input, told in words for the person who gave it. The command line prints it and exits with code 2."""
