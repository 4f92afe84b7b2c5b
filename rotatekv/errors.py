"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what was asked for: one line that says what is wrong and how to fix it.

    The scripts print the line and end with exit status 2; in a notebook it is an ordinary ``ValueError``.
    """
