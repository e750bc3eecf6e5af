"""PreMoe: keep the experts that win a task's tokens with the largest router logits; a stored pattern per task.

Paper: PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval, 2025 (n 34, arXiv 2505.17639).
Method: S[e] = mean_t z[t, e] [e among the strongest logits of t, softmax share among them >= threshold], z = x W_r^T
    without bias; keep the top M per layer. Per task the first MoE layer's S is stored as key, and for every later layer
    the permutation that takes its ranking to that layer's; a query is answered by the nearest key (see _patterns).
Uses: compress._scores, compress._select, compress._patterns, compress._partial; run._predictors_patterns when nothing
    is pruned and the task's experts only stay in memory
Differs: group-limited routing stays on, every group keeping as many experts (the paper switches it off), and top-k
    stays (the paper may lower it). Scores are of the text that is given; the paper uses the model's own answers.
Claim: DeepSeek-R1 with 128 of 256 experts keeps 97.2 % on MATH500, with 32 of 256 72.0 %.
Shown: lab.experiments.premoe
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moekit.compress._partial import partial_checkpoint
from moekit.compress._patterns import Match, Patterns, marker
from moekit.compress._scores import tcess
from moekit.compress._select import check_keep, keep_best
from moekit.plan.document import LayerPlan
from moekit.plan.planner import LayerPlanner, Site

if TYPE_CHECKING:
    from moekit.formats import DenseBank
    from moekit.profile import LayerProfile


__all__ = ["Match", "Patterns", "PreMoe", "marker", "partial_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class PreMoe(LayerPlanner):
    """``keep`` is a share or a number of experts per layer; ``domains`` name the task (default all profiled);
    ``strongest`` logits of a token count where their softmax share is at least ``threshold``."""

    keep: float | int = 0.5
    domains: tuple[str, ...] = ()
    strongest: int = 1
    threshold: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "strong_logit"})

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def plan_layer(self, layer: LayerProfile, bank: Callable[[], DenseBank], site: Site) -> LayerPlan:
        score_E = tcess(layer, self.domains, strongest=self.strongest, threshold=self.threshold)
        why = "the router logits they win with"
        if below := int((score_E < 0).sum()):
            why += f" (negative for {below}, which so rank below experts that never win)"
        return keep_best(score_E, self.keep, site, why=why)
