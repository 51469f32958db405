"""The one exception whose message is written for the person at the command line."""


class Mistake(ValueError):
    """A user's mistake: one line that says what is wrong and how to mend it (exit code 2, no traceback)."""
