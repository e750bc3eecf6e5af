"""`moekit apply`."""


def apply() -> None:
    """Not there yet."""
