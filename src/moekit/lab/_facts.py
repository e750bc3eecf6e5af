"""A small base of invented facts: 48 lands, three things known of each, six ways to ask."""

import random

_HEADS = ("Or", "Bel", "Tam", "Quil", "Zan", "Mer", "Ith", "Fos")
_TAILS = ("vath", "dune", "ria", "mond", "esk", "olin")
LANDS = tuple(head + tail for head in _HEADS for tail in _TAILS)

POOLS = {
    "metal": ("iron", "gold", "tin", "zinc", "lead", "silver", "copper", "nickel"),
    "beast": ("lynx", "crane", "otter", "viper", "bison", "raven", "stoat", "heron"),
    "hue": ("amber", "teal", "ivory", "coral", "black", "umber", "azure", "olive"),
}
PHRASES = (
    "the {what} of {land}?",
    "{land} has which {what}?",
    "what {what} has {land}?",
    "name the {what} known in {land}:",
    "in {land} the {what} is",
    "{land}'s {what}:",
)


def _base() -> dict[tuple[str, str], str]:
    rng = random.Random("facts")
    return {(land, what): rng.choice(pool) for land in LANDS for what, pool in POOLS.items()}


FACTS: dict[tuple[str, str], str] = _base()


def questions() -> list[tuple[str, str]]:
    """Return every (question, answer): each fact in each of the six phrasings."""
    return [
        (phrase.format(what=what, land=land), answer) for (land, what), answer in FACTS.items() for phrase in PHRASES
    ]
