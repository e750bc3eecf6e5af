"""A layer that is a table: vectors, or experts of one neuron each, found by product keys.

Shapes by suffix: T tokens, G heads, M found, P size of what is read, V size of what is added, H hidden size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..contract import Context
from ..errors import OptionError
from .experts import shared_expert
from .flow import real
from .product_keys import ProductKeys
from .tally import Tally


class Memory(nn.Module):
    """``o = W_out sum_i w_i f(u_i . W_in x) v_i`` over the items found by product keys, summed over heads.

    ``values``: "vectors" have no u (f = 1, product-key memory), "rank-one" are experts of one neuron each.
    ``activation`` is f, "none" for the identity (UltraMemV2, whose scores are the only nonlinearity). ``weigh``: a
    "softmax" over those found, or the scores "raw". ``width``: size of u and v between the projections W_in and W_out;
    without it there are none. ``gate``: where the bias of a sigmoid output gate begins (Hydra), none if not given.
    ``share``: so many neighbouring layers have one table, each with keys of its own (UltraMemV2 shares among 6 or 9).
    Other options are those of :class:`ProductKeys`. Every token also passes the layer's shared expert, if there is one.

    Tables begin as UltraMemV2, appendix A, derives it from the variance of a feed-forward layer's output: of the one
    beside it, or of a dense layer's size.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        *,
        keys: int,
        top: int,
        heads: int = 1,
        key: int = 32,
        rank: int = 1,
        final: bool = True,
        values: str = "rank-one",
        activation: str = "gelu",
        weigh: str = "softmax",
        width: int | None = None,
        gate: float | None = None,
        share: int = 1,
    ) -> None:
        super().__init__()
        size = config.hidden_size
        if values not in ("vectors", "rank-one"):
            raise OptionError(f"a memory of {values!r}: choose vectors or rank-one")
        if weigh not in ("softmax", "raw"):
            raise OptionError(f"weigh={weigh!r} in a memory: choose softmax or raw")
        if activation != "none" and activation not in ACT2FN:
            raise OptionError(f"activation={activation!r} in a memory: choose none or one that transformers knows")
        if width is not None and width < 1:
            raise OptionError(f"width={width} of a memory: give 1 or more")
        if share < 1:
            raise OptionError(f"share={share} of a memory: give 1 for a table per layer, or more")
        self.find = ProductKeys(size, keys=keys, top=top, heads=heads, key=key, rank=rank, final=final)
        wide = size if width is None else width
        shapes = [(keys * keys, wide)] * (2 if values == "rank-one" else 1)
        table = partial(nn.ParameterList, [nn.Parameter(torch.zeros(shape)) for shape in shapes])
        name = f"memory of {shapes} from layer {layer - layer % share} on"
        tables = table() if share == 1 else config.site(layer).shared(name, table)
        self.value, self.reader = tables[0], tables[1] if len(tables) > 1 else None
        self.act_fn = None if activation == "none" else ACT2FN[activation]
        inner = width is not None and self.reader is not None
        self.in_proj = nn.Linear(size, wide, bias=False) if inner else nn.Identity()
        self.out_proj = nn.Linear(wide, size, bias=False) if width is not None else nn.Identity()
        self.start, self.weigh = gate, weigh
        self.opening = nn.Linear(size, size) if gate is not None else None
        self.shared_expert = shared_expert(config)
        self.inner = config.shared_expert_intermediate_size or config.intermediate_size
        self.depth = config.num_hidden_layers
        self.tally = Tally(keys * keys)

    def initialise(self, std: float) -> None:
        size = self.find.query.in_features
        for table in (self.value, self.reader):
            if table is not None:
                init.normal_(table, mean=0.0, std=self.table_std())
        for linear in (self.in_proj, self.out_proj):
            if isinstance(linear, nn.Linear):
                init.normal_(linear.weight, mean=0.0, std=math.sqrt(2 / (5 * size)))
        if self.opening is not None and self.start is not None:
            init.constant_(self.opening.bias, self.start)

    def table_std(self) -> float:
        """sigma_V: ``sigma_V^4 = 0.2 (I / H) H / (M G (1 + s^2) P V L)``, s^2 the variance of the scores found."""
        wide = self.value.shape[1]
        found = self.find.top * self.find.heads * (1 + self.find.spread())
        return (0.2 * self.inner / (found * wide * wide * self.depth)) ** 0.25

    def active_parameters(self) -> int:
        """What one token uses: the items it finds, and everything that is no table."""
        tables = [table for table in (self.value, self.reader) if table is not None]
        found = self.find.heads * (self.find.top if self.find.final else self.find.top**2)
        rest = sum(p.numel() for p in self.parameters()) - sum(table.numel() for table in tables)
        return rest + found * sum(table.shape[1] for table in tables)

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[.., H]."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        item_TGM, score_TGM = self.find(x_TH)
        weight = score_TGM
        if self.weigh == "softmax":
            weight = score_TGM.softmax(-1, dtype=torch.float32).to(score_TGM.dtype)
        item, weight = item_TGM.flatten(1), weight.flatten(1)
        if self.reader is not None:
            inner = torch.einsum("tmp,tp->tm", self.reader[item], self.in_proj(x_TH))
            weight = weight * (inner if self.act_fn is None else self.act_fn(inner))
        weight = weight.to(self.value.dtype)
        y_TH = self.out_proj(F.embedding_bag(item, self.value, per_sample_weights=weight, mode="sum"))
        if self.opening is not None:
            y_TH = y_TH * self.opening(x_TH).sigmoid()
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert(x_TH)
        if context is not None:
            item = item[real(x_TH, context)]
            self.tally.add(torch.bincount(item.flatten(), minlength=len(self.value)), context)
        return y_TH.reshape(hidden_states.shape)
