"""An arena's texts from what a person gives: the same documents for every seed, cut into parts anew by each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain

import numpy as np

from moekit.plan import split_held_out
from moekit.profile import Profile

ASIDE = 0.4
"""Share of the text that calibrates nothing: half of it chooses among plans, half judges."""


class OwnTexts:
    """``observe(seed, held_out)`` profiles the text with a share kept aside; ``judge``: sequences by domain that judge
    instead of the share kept aside."""

    def __init__(
        self, observe: Callable[[int, float], Profile], judge: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> None:
        self._judge = judge
        self.profile = cache(lambda seed: observe(seed, ASIDE))

    def choosing(self, seed: int) -> Sequence[np.ndarray]:
        kept = self.profile(seed).held_out
        return list(chain.from_iterable((kept if self._judge else split_held_out(kept)[0]).values()))

    def judging(self, seed: int) -> Mapping[str, Sequence[np.ndarray]]:
        return self._judge or split_held_out(self.profile(seed).held_out)[1]
