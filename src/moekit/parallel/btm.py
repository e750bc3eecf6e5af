"""BTM: branch a model once for every domain, train the branches without any exchange, merge them by Bayes or by mean.

Paper: Branch-Train-Merge: Embarrassingly Parallel Training of Expert Language Models, 2022 (n 119, arXiv 2208.03306).
Method: branch: theta = sum_j w_j theta_j of the models so far, w their posterior on the new domain. Train: each on its
    own domain. Merge: p(x_t | x_<t) = sum_j p(x_t | x_<t, j) p(j | x_<t), p(j | x_<t) ~ p(x_<t | j) p(j); or one model,
    sum_j w_j theta_j. The cached prior p(j) is the moving average (share 0.3) over development sequences of the mean
    posterior within each, begun from a uniform prior.
Uses: parallel._outer_posterior
Differs: sums are float64. A model with prior 0 is not run, which is the paper's top-k inference.
Claim: better perplexity in and out of domain than a dense model of equal compute at 125M to 1.3B; splitting the text at
    random does not work, and averages work only where all branches have one seed.
Shown: lab.experiments.btm
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from moekit.errors import OptionError
from moekit.parallel._outer_posterior import Ensemble, checked, posteriors, smoothed, told_of

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def average(models: Sequence[Model], weights: Sequence[float] | Tensor) -> Model:
    """A new model with sum_j w_j theta_j, added up in float64: a branch of several, or their merging into one.

    Raises :class:`OptionError` for models of different parameters, or weights that are no distribution.
    """
    weight_J = checked(weights, len(models))
    named = [dict(model.named_parameters()) for model in models]
    for table in named[1:]:
        if {n: p.shape for n, p in table.items()} != {n: p.shape for n, p in named[0].items()}:
            raise OptionError("models to be averaged must have the same parameters: branch all of them from one seed")
    made = copy.deepcopy(models[0])
    for name, parameter in made.named_parameters():
        total = torch.zeros(parameter.shape, dtype=torch.float64)
        for weight, table in zip(weight_J, named, strict=True):
            total += weight * table[name]
        parameter.copy_(total)
    return made


@torch.no_grad()
def cached_prior(models: Sequence[nn.Module], rows: Sequence[Tensor], share: float = 0.3) -> Tensor:
    """p(j) [J] from development rows of token ids [S], each begun from the uniform prior."""
    if not rows:
        raise OptionError("a prior needs development text: give at least one row of tokens")
    uniform = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
    found = []
    for row in rows:
        said = torch.stack([model(input_ids=row[None]).logits.float().log_softmax(-1) for model in models])
        found.append(posteriors(told_of(said, row[None]), uniform).exp().mean((1, 2)))
    return smoothed(found, share)


def best(prior_J: Tensor, count: int) -> Tensor:
    """The prior of the ``count`` most likely models alone; raises :class:`OptionError` for a count out of range."""
    if not 1 <= count <= len(prior_J):
        raise OptionError(f"{count} of {len(prior_J)} models: choose from 1 to {len(prior_J)}")
    kept = torch.zeros_like(prior_J)
    first = prior_J.sort(descending=True, stable=True).indices[:count]
    kept[first] = prior_J[first]
    return kept / kept.sum()


__all__ = ["Ensemble", "average", "best", "cached_prior"]
