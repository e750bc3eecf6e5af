"""Union of Experts (n 12): do learnt choices of slices beat random ones, and full experts chosen by tokens?

Setting: the protocol of ``_league``. Contestants: the base recipe (top-4 of 16 experts, attention by all heads);
``union``, the recipe: each of 16 slices takes a quarter of the tokens, each head at most half of them; ``random``: the
same with routers that stay as they were drawn and weights of 1; ``feed-forward only`` and ``attention only``: one half
of the recipe, the other as in the base. A token is ranked among earlier ones, as nothing else is allowed in a language
model. What a token uses is counted (experts); that heads work on half the tokens is saved work, but not counted.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds of random minus union and of
base minus union in bits per byte lie above zero. Random slices that do as well as learnt ones falsify the claim.

``random`` differs in two ways, frozen routers and weights of 1 (as the released code has): a difference of nothing says
that learnt choices with weights win nothing over both together, not which of the two made up for the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._league import BASE, contestant, lead, league, setting, table

KEY, UNION, RANDOM, FED, ATTENDED = "union-of-experts", "union", "random", "feed-forward only", "attention only"
FROZEN = {"score": {"kind": "linear", "frozen": True}, "weigh": "ones"}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return losses by contestant. ``text`` is not used."""
    attention = contestant(KEY).model["attention"]
    random = {**attention, "router": {**attention["router"], **FROZEN}}
    arms = {
        BASE: contestant(),
        UNION: contestant(KEY),
        RANDOM: contestant(KEY, router=FROZEN, attention=random),
        FED: contestant(KEY, attention="softmax"),
        ATTENDED: contestant(attention=attention),
    }
    found = league(arms, seeds, advance)
    leads = {name: lead(found, name, UNION) for name in arms if name != UNION}
    shown = leads[RANDOM]["low"] > 0 and leads[BASE]["low"] > 0
    return Outcome(shown=shown, figures=table(found) | {"minus_union": leads}, setting=setting(arms))
