"""The one exception that is meant for a person to read."""


class InputError(ValueError):
    """Bad input from outside (a file, an option, a device): one sentence that says what was wrong and what to do."""
