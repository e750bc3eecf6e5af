"""The load-balancing loss, over all scopes, and its variant for experts of several kinds.

Shapes by suffix: T tokens, E choices, B sequences.
"""
# ruff: noqa: N815 (shape suffixes in the names of fields)

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..errors import OptionError
from .flow import gathered, recomputed
from .limits import positive
from .parts import Site
from .seen import Seen, share

SCOPES = ("sequence", "micro", "accumulated", "global")
_PROBABILITIES = {"softmax": "probability_TE", "scores": "scores_TE", "chosen": "selected_TE"}


class Load(nn.Module):
    """``E * sum_i f_i P_i``: f the shares of assignments, P the mean probabilities; 1 at balance, E for one expert.

    Switch Transformer, equations 4 to 6, for any number of slots: f divides by all assignments. ``scope`` says over
    what f and P are taken: each "sequence" (then the mean), the "micro" batch, all micro-batches "accumulated" since
    the last update, or those of all ranks too ("global"; Demons in the Detail). The wider two widen f only: P is the
    micro-batch's, which gives the gradient of the whole. ``probability``: "softmax", the router's own "scores", or the
    softmax over those "chosen" alone. With ``groups`` so many equal groups of neighbours are balanced instead, such as
    the experts of one device (DeepSeekMoE, device-level balance). Choices that are no candidates do not count.
    """

    count_E: Tensor

    def __init__(self, site: Site, *, scope: str = "micro", probability: str = "softmax", groups: int = 0) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise OptionError(f"scope={scope!r} of a load-balancing loss: choose one of {', '.join(SCOPES)}")
        if probability not in _PROBABILITIES:
            raise OptionError(f"probability={probability!r} of a load-balancing loss: choose softmax, scores or chosen")
        if groups < 0 or (groups and site.choices % groups):
            raise OptionError(f"{groups} groups do not divide {site.choices} choices evenly")
        self.scope, self.probability, self.groups = scope, probability, groups
        self.register_buffer("count_E", torch.zeros(groups or site.choices), persistent=False)

    def initialise(self, std: float) -> None:
        init.zeros_(self.count_E)

    def forward(self, seen: Seen) -> Tensor:
        probability = self._grouped(getattr(seen, _PROBABILITIES[self.probability]))
        chosen = self._grouped(seen.chosen_TE)
        candidates = (self._grouped(seen.candidates_E.float()) > 0).sum()
        if self.scope == "sequence":
            return candidates * self._by_sequence(seen, probability, chosen)
        count = chosen.sum(0)
        if self.scope != "micro":
            if not recomputed():
                self.count_E += gathered(count) if self.scope == "global" else count
            count = self.count_E.clone()
        return candidates * (self.shares(count) * seen.mean(probability)).sum()

    def shares(self, count_E: Tensor) -> Tensor:
        """f [.., E] of counts."""
        return share(count_E)

    def finish_step(self) -> None:
        """The optimizer has stepped: what was accumulated is forgotten."""
        self.count_E.zero_()

    def _grouped(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.groups, -1)).sum(-1) if self.groups else values

    def _by_sequence(self, seen: Seen, probability_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        sequence = seen.context.sequence
        if sequence is None:
            sequence = torch.zeros(len(seen.x_TH), dtype=torch.int64, device=seen.x_TH.device)
        rows = int(sequence.max()) + 1 if len(sequence) else 1
        sums = probability_TE.new_zeros(rows, probability_TE.shape[1])
        count_BE = sums.index_add(0, sequence, chosen_TE)
        mass_BE = sums.index_add(0, sequence, probability_TE * seen.real_T[:, None])
        length_B = sums[:, 0].index_add(0, sequence, seen.real_T)
        terms = (self.shares(count_BE) * mass_BE / length_B[:, None].clamp(min=1)).sum(1)
        return terms[length_B > 0].mean() if bool((length_B > 0).any()) else terms.sum()


class SoftLoad(nn.Module):
    """``E * sum_i g_i^2``, g the mean over tokens of ``softmax(logits / temperature)``: 1 at balance, E for one expert.

    The colder, the nearer g is to the shares of a top-1 router, yet with a gradient: even probabilities that hide an
    uneven load, which cost :class:`Load` nothing, cost here (Sigma-MoE-Tiny, top-1 load-balancing loss).
    """

    temperature = positive("temperature={value} of a soft load must be positive")

    def __init__(self, site: Site, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, seen: Seen) -> Tensor:
        load_E = seen.mean((seen.logits_TE / self.temperature).softmax(-1))
        return seen.candidates_E.sum() * load_E.square().sum()


class KindLoad(Load):
    """``E * sum_i eta_i f_i P_i`` with eta 1 for experts with weights and ``others`` for the rest.

    It is least where f is in proportion to 1 / eta: MoE++ (whose tau is ``others``; its f is not divided by k, nor its
    sum multiplied by E). ``average`` gives each of the others the mean frequency of all of them, so that they need not
    be balanced among themselves (AdaMoE, null experts).
    """

    others = positive("others={value} weighs the load of experts without weights: give a positive number")

    def __init__(
        self,
        site: Site,
        *,
        others: float = 1.0,
        average: bool = False,
        scope: str = "micro",
        probability: str = "softmax",
    ) -> None:
        super().__init__(site, scope=scope, probability=probability)
        self.others, self.average, self.experts = others, average, site.num_experts

    def shares(self, count_E: Tensor) -> Tensor:
        part = super().shares(count_E)
        other = part[..., self.experts :]
        if self.average and other.shape[-1]:
            other = other.mean(-1, keepdim=True).expand_as(other)
        return torch.cat((part[..., : self.experts], other * self.others), dim=-1)
