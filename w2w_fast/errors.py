"""The one error that a caller's mistake raises."""


class InputError(ValueError):
    """Bad input: the message names the argument, what was wanted, what came and the way out.

    The command line prints it on one line and exits with code 2; nothing has been written.
    """
