"""`moekit demo`."""


def demo() -> None:
    """Not there yet."""
