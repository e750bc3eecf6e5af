"""Several language models as one, by exact Bayes in log space: which of them is writing, given what was written so far.

Shapes by suffix: J models, B sequences, S tokens, N tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import OptionError


def checked(prior: Sequence[float] | Tensor, count: int) -> Tensor:
    """float64 [J]; raises :class:`OptionError` unless it is a probability distribution over ``count`` models."""
    prior_J = torch.as_tensor(prior, dtype=torch.float64)
    if prior_J.shape != (count,) or bool((prior_J < 0).any()) or abs(float(prior_J.sum()) - 1) > 1e-6:
        raise OptionError(
            f"prior {[round(float(p), 4) for p in prior_J.flatten()]} for {count} models: give one number for each, "
            "none negative, with sum 1"
        )
    return prior_J / prior_J.sum()


def posteriors(told_JBS: Tensor, prior_J: Tensor) -> Tensor:
    """log p(j | tokens before s), [J, B, S + 1], from ``told`` = log p(token s | tokens before it, j).

    Only what lies before a token weighs the models for it. Sums are float64, so that no likelihood underflows.
    """
    past = torch.cat([torch.zeros_like(told_JBS[..., :1]), told_JBS], -1).double().cumsum(-1)
    return (prior_J.log()[:, None, None] + past).log_softmax(0)


def smoothed(means_J: Iterable[Tensor], share: float = 0.3) -> Tensor:
    """Exponential moving average, begun by the first: m <- (1 - share) m + share x."""
    values = iter(means_J)
    mean = next(values).double()
    for value in values:
        mean = (1 - share) * mean + share * value.double()
    return mean / mean.sum()


def best_static(told_JN: Tensor, rounds: int = 200) -> Tensor:
    """The prior [J] that maximises sum_n log sum_j prior_j p_j(n): what the best fixed weights could reach (EM)."""
    told = told_JN.double()
    prior = torch.full((len(told),), 1 / len(told), dtype=torch.float64)
    for _ in range(rounds):
        prior = (prior.log()[:, None] + told).softmax(0).mean(1)
    return prior


class Ensemble(nn.Module):
    """p(x_s | x_<s) = sum_j p(x_s | x_<s, j) p(j | x_<s), called as a causal language model is; logits are log p.

    ``prior`` [J] is p(j); a model whose prior is 0 is never run. With ``update`` False the weights stay the prior.
    Raises :class:`OptionError` for a prior that is none.
    """

    def __init__(self, models: Sequence[nn.Module], prior: Sequence[float] | Tensor, *, update: bool = True) -> None:
        super().__init__()
        prior_J = checked(prior, len(models))
        self.models = nn.ModuleList(model for model, p in zip(models, prior_J, strict=True) if p > 0)
        self.prior = prior_J[prior_J > 0]
        self.update = update
        self.config: Any = models[0].config

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """``.logits`` [B, S, V]: log-probabilities of the token after each."""
        inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        said_JBSV = torch.stack([model(**inputs).logits.float().log_softmax(-1) for model in self.models])
        weight_JBS = self._weights(said_JBSV, input_ids, attention_mask)
        return SimpleNamespace(logits=(said_JBSV + weight_JBS[..., None].float()).logsumexp(0))

    def _weights(self, said_JBSV: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if not self.update:
            return self.prior.log()[:, None, None]
        told = told_of(said_JBSV, input_ids)
        if attention_mask is not None:
            told = told * (attention_mask[:, 1:] * attention_mask[:, :-1])
        return posteriors(told, self.prior)


def told_of(said_JBSV: Tensor, input_ids: Tensor) -> Tensor:
    """[J, B, S - 1]: the log-probability that each model gave to each token after the first."""
    following = input_ids[None, :, 1:, None].expand(len(said_JBSV), -1, -1, 1)
    return said_JBSV[:, :, :-1].gather(-1, following)[..., 0]
