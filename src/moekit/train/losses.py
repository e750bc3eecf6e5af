"""Losses on next-token logits, with masks that are shifted once: position s predicts token s + 1.

Shapes by suffix: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.errors import TextError
from moekit.train.sequences import Batch, targets


def weighted_mean(values_BS: Tensor, weight_BS: Tensor) -> Tensor:
    """The mean of what counts. Raises :class:`TextError` where nothing does."""
    total = weight_BS.sum()
    if total <= 0:
        raise TextError("no token of this batch counts towards the loss: give sequences with something to predict")
    return (values_BS * weight_BS).sum() / total


def lm(logits_BSV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats per counted token."""
    goal, weight = targets(batch)
    flat = logits_BSV[:, :-1].float()
    losses = F.cross_entropy(flat.flatten(0, 1), goal.flatten(), reduction="none").view(goal.shape)
    return weighted_mean(losses, weight)


def kl(student_BSV: Tensor, teacher_BSV: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, in nats per counted token (Hinton et al. 2015).

    Where the vocabularies differ in size, both are cut to the smaller: ids are then assumed to mean the same.
    """
    size = min(student_BSV.shape[-1], teacher_BSV.shape[-1])
    student = (student_BSV[:, :-1, :size].float() / temperature).log_softmax(-1)
    teacher = (teacher_BSV[:, :-1, :size].float() / temperature).log_softmax(-1)
    gap = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * weighted_mean(gap, targets(batch)[1])


def log_probability(logits_BSV: Tensor, batch: Batch) -> Tensor:
    """[B]: the log-probability of each sequence's counted tokens, summed."""
    goal, weight = targets(batch)
    chosen = logits_BSV[:, :-1].float().log_softmax(-1).gather(-1, goal[..., None])[..., 0]
    return (chosen * weight).sum(-1)


def dpo(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """-log sigmoid(beta * ((pi_w - pi_l) - (ref_w - ref_l))), mean over pairs; each pair is (chosen [B], rejected [B]).

    Direct preference optimisation (arXiv 2305.18290), equation 7.
    """
    return -F.logsigmoid(beta * margin(policy, reference)).mean()


def margin(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> Tensor:
    """[B]: by how much more than the reference the policy prefers the chosen to the rejected."""
    return (policy[0] - policy[1]) - (reference[0] - reference[1])


def kto_pair(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """The pairwise form of KTO (arXiv 2402.01306): each half is held against the other half's divergence.

    Mean of 1 - sigmoid(beta * (d_w - KL_l)) and 1 - sigmoid(beta * (KL_w - d_l)), where d = pi - ref and KL is the
    batch mean of d, at least 0.
    """
    won, lost = policy[0] - reference[0], policy[1] - reference[1]
    kl_won, kl_lost = won.mean().clamp(min=0), lost.mean().clamp(min=0)
    halves = torch.cat([torch.sigmoid(beta * (won - kl_lost)), torch.sigmoid(beta * (kl_won - lost))])
    return (1 - halves).mean()
