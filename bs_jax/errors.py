"""The one error type for mistakes a user can mend: printed as one line, never as a traceback."""


class UserError(ValueError):
    """A mistake in the input; the message names the numbers and a fix, in one line."""
