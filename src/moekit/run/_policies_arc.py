"""ARC: adaptive replacement between recency and frequency, steered by what was evicted too early.

Megiddo and Modha, ARC: a self-tuning, low overhead replacement cache, 2003, figure 4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moekit.run.policy import CachePolicy, Key

_List = OrderedDict[Key, None]


@dataclass(eq=False)
class _Lists:
    """T1, T2 (resident: asked for once, or again), their ghosts B1, B2, and the size that T1 should have."""

    once: _List = field(default_factory=OrderedDict)
    again: _List = field(default_factory=OrderedDict)
    ghost_once: _List = field(default_factory=OrderedDict)
    ghost_again: _List = field(default_factory=OrderedDict)
    target: float = 0.0
    size: int = 0
    forget: Key | None = None

    def seen(self, key: Key, first: bool) -> None:
        """A resident expert is asked for; ``first`` where it only ever was prefetched."""
        self.once.pop(key, None)
        self.again.pop(key, None)
        (self.once if first else self.again)[key] = None

    def adapt(self, key: Key) -> None:
        """An expert that is known only as a ghost is asked for: its list deserved more room."""
        once, again = len(self.ghost_once), len(self.ghost_again)
        if key in self.ghost_once:
            self.target = min(self.size, self.target + max(1.0, again / once))
        else:
            self.target = max(0.0, self.target - max(1.0, once / again))

    def trim(self) -> bool:
        """Make room for one more name; True where T1 alone is as large as the cache, which leaves no ghost."""
        if len(self.once) + len(self.ghost_once) >= self.size:
            if not self.ghost_once:
                return True
            self.ghost_once.popitem(last=False)
        elif self.names >= 2 * self.size and self.ghost_again:
            self.ghost_again.popitem(last=False)
        return False

    @property
    def names(self) -> int:
        return len(self.once) + len(self.again) + len(self.ghost_once) + len(self.ghost_again)

    def oldest(self, candidates: set[Key], once_first: bool) -> Key | None:
        lists = (self.once, self.again) if once_first else (self.again, self.once)
        return next((key for one in lists for key in one if key in candidates), None)


@dataclass(kw_only=True, eq=False)
class ARC(CachePolicy):
    """One set of lists per layer, or one for all where ``pool`` is ``global``.

    The size of the cache is that of what is resident when a victim is asked for. With requests of one expert each and
    no prefetching this is ARC as published; the experts of a larger request are taken one after the other.
    """

    pool: Literal["layer", "global"] = "layer"
    _lists: dict[int, _Lists] = field(default_factory=dict, init=False)
    _asked: set[Key] = field(default_factory=set, init=False)
    _returning: set[Key] = field(default_factory=set, init=False)
    _untouched: set[Key] = field(default_factory=set, init=False)

    def routed(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None) -> None:
        lists = self._of(layer)
        self._asked = {(layer, expert) for expert in experts}
        self._returning = set()
        for key in ((layer, expert) for expert in experts):
            if key in lists.once or key in lists.again:
                lists.seen(key, first=key in self._untouched)
                self._untouched.discard(key)
            elif key in lists.ghost_once or key in lists.ghost_again:
                lists.adapt(key)
                self._returning.add(key)

    def admitted(self, key: Key) -> None:
        lists = self._of(key[0])
        lists.ghost_once.pop(key, None)
        lists.ghost_again.pop(key, None)
        (lists.again if key in self._returning else lists.once)[key] = None
        if key not in self._asked:
            self._untouched.add(key)

    def evicted(self, key: Key) -> None:
        lists = self._of(key[0])
        self._untouched.discard(key)
        for own, ghost in ((lists.once, lists.ghost_once), (lists.again, lists.ghost_again)):
            if key in own:
                del own[key]
                if key != lists.forget:
                    ghost[key] = None
        lists.forget = None

    def victim(self, resident: Collection[Key], pinned: Collection[Key], incoming: Key) -> Key | None:
        candidates = set(resident) - set(pinned)
        if not candidates:
            return None
        lists = self._of(next(iter(candidates))[0])
        lists.size = len(resident)
        known = incoming in lists.ghost_once or incoming in lists.ghost_again
        lists.forget = None
        if not known and lists.trim():
            lists.forget = lists.oldest(candidates, once_first=True)
            return lists.forget
        once = len(lists.once)
        full = once > lists.target or (once == lists.target and incoming in lists.ghost_again)
        return lists.oldest(candidates, once_first=bool(once) and full)

    def _of(self, layer: int) -> _Lists:
        return self._lists.setdefault(layer if self.pool == "layer" else 0, _Lists())
