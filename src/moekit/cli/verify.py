"""`moekit verify`."""


def verify() -> None:
    """Not there yet."""
