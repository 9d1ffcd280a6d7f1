"""The one exception that bad input raises."""


class InputError(ValueError):
    """Bad input: a config field or a file that the run cannot use.

    The message is one line that names the field or file, its value and what is allowed.
    `main` prints it on stderr and exits with status 2.
    """

    def __init__(self, where: str, value: object, allowed: str):
        """Args: where: config field (`config.cut`) or file; value: as found; allowed: what is."""
        super().__init__(f"{where} = {value!r}: {allowed}".replace("\n", " "))
