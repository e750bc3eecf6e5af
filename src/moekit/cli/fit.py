"""`moekit fit`."""


def fit() -> None:
    """Not there yet."""
