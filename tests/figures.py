"""An experiment's figures with one of them changed, to see that its rule rests on it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any


def changed(figures: Mapping[str, Any], path: Sequence[str], value: Any) -> Any:
    """A copy in which what ``path`` leads to is ``value``."""
    found = copy.deepcopy(figures)
    place: Any = found
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return found
