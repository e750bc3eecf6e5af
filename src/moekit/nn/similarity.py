"""A balance term that says which sequences should be routed alike.

Shapes by suffix: T tokens, E choices, B sequences, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .given import known_label, label_of
from .parts import Site
from .seen import Seen


class Similarity(nn.Module):
    """The mean over pairs of sequences of ``|P_ij - Q_ij|``: sequences of similar labels go to similar experts.

    P is the cosine of the sequences' mean probabilities, Q that of their labels, each sequence being described by how
    many of its tokens have each label: 1 for the same, 0 for none in common. Relational: which experts a label gets is
    left open (ProPhy, semantic alignment, which sums over the pairs of a batch). ``label`` is "task" or "modality".
    0 where there is one sequence; padding counts for nothing.

    Raises :class:`OptionError` where the input has no such labels.
    """

    def __init__(self, site: Site, *, label: str = "task") -> None:
        super().__init__()
        self.label = known_label(label)

    def forward(self, seen: Seen) -> Tensor:
        label_T, sequence_T = label_of(seen.context, self.label), seen.context.sequence
        if sequence_T is None or not len(label_T):
            return seen.probability_TE.sum() * 0
        known, number_T = label_T.unique(return_inverse=True)
        batch = int(sequence_T.max()) + 1
        mean_BE, label_BL = (
            values.new_zeros(batch, values.shape[1]).index_add(0, sequence_T, values * seen.real_T[:, None])
            for values in (seen.probability_TE, F.one_hot(number_T, len(known)).to(seen.real_T.dtype))
        )
        apart_BB = (alike(mean_BE) - alike(label_BL)).abs()
        return apart_BB.sum() / max(batch * (batch - 1), 1)


def alike(values_BN: Tensor) -> Tensor:
    """[B, B]: the cosine of each row with each, 1 with itself, also where it is all zeros."""
    unit = F.normalize(values_BN, dim=-1)
    own = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return (unit @ unit.T).masked_fill(own, 1)
