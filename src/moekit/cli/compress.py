"""`moekit compress`."""


def compress() -> None:
    """Not there yet."""
