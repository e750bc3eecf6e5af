"""What mixes tokens along a sequence, in the kinds a configuration can name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention import Attention
from .attention_experts import AttentionExperts
from .heads import Heads
from .mixed import Sum
from .selected_heads import SelectedHeads
from .state_space import StateSpace

ATTENTIONS: dict[str, Callable[..., Any]] = {
    "softmax": Attention,
    "heads": Heads,
    "experts": AttentionExperts,
    "selected": SelectedHeads,
    "state-space": StateSpace,
    "sum": Sum,
}
"""By the name a configuration gives; built with (config, layer), called as :class:`Attention` is. One that needs more
than the key-value cache to go on generating says ``cached = False``."""
