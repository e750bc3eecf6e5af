"""A selective state-space layer (Mamba) in plain torch, its projections of one kind or one per modality.

Shapes by suffix: B sequences, S positions, T = B S tokens, D inner size, N states, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .flow import carry, real
from .given import label_of
from .grouped import GroupedLinear
from .scan import scan

SPLIT = ("in", "x", "dt", "out")


class StateSpace(nn.Module):
    """Mamba (Gu and Dao 2023, section 3), where attention would stand: ``h_t = exp(dt A) h_{t-1} + dt B_t u_t``.

    With ``modalities`` above 1 the projections named by ``split`` exist once per modality, and each token uses its own
    (Mixture-of-Mamba): "in", "x", "dt", "out". The convolution, A and D are shared, and one scan runs over the mixed
    sequence. How many tokens each has goes to the carry's ``other_load``, under "attention". Padding leaves the state
    as it is. The state is not kept between calls, so generation runs the text anew.

    Raises:
        OptionError: sizes below 1, an unknown projection, no modality ids where they are needed, or too high ones.
    """

    cached = False

    def __init__(
        self,
        config: Any,
        layer: int,
        *,
        state: int = 16,
        expand: int = 2,
        kernel: int = 4,
        rank: int | None = None,
        modalities: int = 1,
        split: Sequence[str] = SPLIT,
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.rank = math.ceil(size / 16) if rank is None else rank
        if min(state, expand, kernel, self.rank, modalities) < 1:
            raise OptionError("a state-space layer needs state, expand, kernel, rank and modalities of 1 or more")
        for name in split:
            if name not in SPLIT:
                raise OptionError(f"split names {name!r}: choose among {', '.join(SPLIT)}")
        inner = size * expand
        self.modalities, self.states = modalities, state
        groups = {name: modalities if name in split else 1 for name in SPLIT}
        self.in_proj = GroupedLinear(groups["in"], size, 2 * inner)
        self.x_proj = GroupedLinear(groups["x"], inner, self.rank + 2 * state)
        self.dt_proj = GroupedLinear(groups["dt"], self.rank, inner, bias=True)
        self.out_proj = GroupedLinear(groups["out"], inner, size)
        self.conv = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.A_log = nn.Parameter(torch.zeros(inner, state))
        self.D = nn.Parameter(torch.zeros(inner))

    def initialise(self, std: float) -> None:
        """As in Mamba: A is -1 to -N, steps dt between 0.001 and 0.1, drawn anew for every copy; so is the window."""
        init.copy_(self.A_log, torch.arange(1.0, self.states + 1).log().expand_as(self.A_log))
        init.ones_(self.D)
        reach = self.conv.weight.shape[-1] ** -0.5  # not the model's own deviation, which would mute so narrow a window
        init.uniform_(self.conv.weight, -reach, reach)
        init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        assert self.dt_proj.bias is not None
        low, high = math.log(1e-3), math.log(1e-1)
        step = (torch.rand(self.dt_proj.bias.shape) * (high - low) + low).exp()
        init.copy_(self.dt_proj.bias, step + (-torch.expm1(-step)).log())  # the inverse of softplus

    def active_parameters(self) -> int:
        """What one token uses: one copy of each projection."""
        projections = [getattr(self, f"{name}_proj") for name in SPLIT]
        copies = sum(p.numel() for one in projections for p in one.parameters())
        return sum(p.numel() for p in self.parameters()) - copies + sum(one.parameters_per_map() for one in projections)

    def forward(self, hidden_BSH: Tensor, context: Context, **attention: Any) -> Tensor:
        """[B, S, H]."""
        batch, length, size = hidden_BSH.shape
        group_T = self._groups(batch * length, context, hidden_BSH.device)
        real_BS1 = None if context.padding is None else ~context.padding.view(batch, length, 1)
        both = self._project(self.in_proj, hidden_BSH.reshape(-1, size), group_T)
        u_BSD, gate_BSD = both.view(batch, length, -1).chunk(2, dim=-1)
        u_BSD = u_BSD if real_BS1 is None else u_BSD * real_BS1
        u_BSD = F.silu(self.conv(u_BSD.transpose(1, 2))[..., :length].transpose(1, 2))
        parts = self._project(self.x_proj, u_BSD.reshape(batch * length, -1), group_T)
        rank, b, c = parts.split((self.rank, self.states, self.states), dim=-1)
        dt_BSD = F.softplus(self._project(self.dt_proj, rank, group_T).view(u_BSD.shape).float())
        dt_BSD = dt_BSD if real_BS1 is None else dt_BSD * real_BS1
        y_BSD = self._scanned(u_BSD, dt_BSD, b.view(batch, length, -1), c.view(batch, length, -1))
        y_BSD = y_BSD.to(u_BSD.dtype) + self.D * u_BSD
        out = self._project(self.out_proj, (y_BSD * F.silu(gate_BSD)).reshape(batch * length, -1), group_T)
        return out.view(batch, length, size)

    def _scanned(self, u_BSD: Tensor, dt_BSD: Tensor, b_BSN: Tensor, c_BSN: Tensor) -> Tensor:
        """[B, S, D] in float32, whatever the layer computes in."""
        decay_DN = -self.A_log.float().exp()
        decay = (dt_BSD[..., None] * decay_DN).exp()
        entry = (dt_BSD * u_BSD.float())[..., None] * b_BSN.float()[:, :, None]
        return torch.einsum("bsdn,bsn->bsd", scan(decay, entry), c_BSN.float())

    def _groups(self, tokens: int, context: Context, device: torch.device) -> Tensor:
        if self.modalities == 1:
            return torch.zeros(tokens, dtype=torch.int64, device=device)
        group_T = label_of(context, "modality", self.modalities)
        count = torch.bincount(group_T[real(group_T, context)], minlength=self.modalities)
        carry(context).other_load.setdefault("attention", []).append(count)
        return group_T

    def _project(self, linear: GroupedLinear, x: Tensor, group_T: Tensor) -> Tensor:
        return linear(x, group_T if len(linear.weight) > 1 else torch.zeros_like(group_T))
