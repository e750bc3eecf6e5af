"""Pre-gated MoE: the gate in block n chooses for block n + 1, so that nothing is guessed and nothing is waited for.

Paper: Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference, 2023 (n 106).
Method: block n + 1 uses the experts and weights of softmax(W_n x_n), x_n what block n's router reads; block 0 keeps its
    own gate and has a pre-gate besides, the last has none. While block n computes out of one buffer the chosen experts
    of n + 1 are read into the other: load_0 + sum_n max(compute_n, load_{n+1}). Read all: as much with every expert.
Uses: blocks, run.paging, run.predict
Differs: a pre-gate begins as the next block's own gate; weights are carried with the choice (the paper does not say);
    a family's selection bias stays. Both buffers are one store of twice a block's experts, the last used making room.
Claim: 81 % of the throughput of a resident model in 23 % of its memory; accuracy within noise of normal gates.
Shown: lab.experiments.pre_gated_moe
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from moekit.blocks import MoEBlock, blocks
from moekit.contract import Context, RouterEdit, Routing
from moekit.errors import OptionError, UnsupportedModelError
from moekit.run.paging import Paging, paging
from moekit.run.policy import policy
from moekit.run.predict import Predictor, Ranked, Signal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "pre_gates"


def pre_gates(model: PreTrainedModel) -> nn.ModuleList:
    """A gate for every block but the last: matrices [E, H] that begin as those of the next block's own router.

    Untrained they are the next gate on the current input as the routing itself.

    Raises:
        UnsupportedModelError: fewer than two MoE blocks, or a router that is not one matrix at a module of its own.
    """
    found = blocks(model)
    if len(found) < 2:
        raise UnsupportedModelError(f"{type(model).__name__} has {len(found)} MoE blocks: pre-gates need two or more")
    gates = nn.ModuleList()
    for block in found[1:]:
        weight_EH = _matrix(block)
        gate = nn.Linear(weight_EH.shape[1], weight_EH.shape[0], bias=False)
        gate.weight = nn.Parameter(weight_EH.detach().clone())
        gates.append(gate)
    return gates


def _matrix(block: MoEBlock) -> Tensor:
    wide = [p for p in block.router_module.parameters() if p.dim() == 2 and p.shape[0] == block.num_experts]
    if block.router.inline or len(wide) != 1:
        raise UnsupportedModelError(f"the router of {block.name} is not one matrix of a module: it has no pre-gate")
    return wide[0]


class PreGated:
    """The change at work on a live model: ``with PreGated(model, gates):``. Parameters are ``pre_gates.*`` meanwhile.

    Later blocks' own gates still run, and nothing they say is used. Gradients pass through the carried logits.
    """

    def __init__(self, model: PreTrainedModel, gates: nn.ModuleList) -> None:
        self.model, self.gates, self.blocks = model, gates, blocks(model)
        if len(gates) != len(self.blocks) - 1:
            raise OptionError(
                f"{len(gates)} pre-gates for {len(self.blocks)} MoE blocks: expected one less than blocks"
            )
        self._carried: dict[int, Tensor] = {}
        self._attached: list[Any] = []

    def __enter__(self) -> Self:
        self.model.add_module(NAME, self.gates)
        for layer, block in enumerate(self.blocks[:-1]):
            hook = self._look(layer)
            self._attached.append(block.router_module.register_forward_pre_hook(hook, with_kwargs=True))
        for layer, block in enumerate(self.blocks[1:], start=1):
            self._attached.append(block.edit(RouterEdit(after_score=self._replace(layer))).attach())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one in self._attached:
            one.remove()
        self._attached, self._carried = [], {}
        del self.model._modules[NAME]

    def _look(self, layer: int) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            x_TH, _ = self.blocks[layer].router.context(args, kwargs)
            self._carried[layer + 1] = self.gates[layer](x_TH)

        return look

    def _replace(self, layer: int) -> Any:
        def replace(logits_TE: Tensor, context: Context) -> Tensor:
            return self._carried[layer].to(logits_TE.dtype)

        return replace


class Chosen(Predictor):
    """No guess: what block ``layer`` has chosen for the next one, and nothing else. One block ahead, whatever the
    horizon; with ``everything``, all of the next block's experts (the baseline that reads all)."""

    def __init__(self, found: Sequence[MoEBlock], gates: nn.ModuleList, everything: bool = False) -> None:
        self.blocks, self.gates, self.everything = found, gates, everything

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        if signal.x_TH is None or not 0 <= layer < len(self.gates):
            return []
        routing = self.routing(layer + 1, signal.x_TH)
        counts = routing.counts(self.blocks[layer + 1].num_experts).tolist()
        ranked = sorted(((expert, float(n)) for expert, n in enumerate(counts)), key=lambda one: (-one[1], one[0]))
        return [[one for one in ranked if one[1] or self.everything]]

    @torch.no_grad()
    def routing(self, layer: int, x_TH: Tensor) -> Routing:
        """Of block ``layer``, from what the router of the block before read."""
        router = self.blocks[layer].router
        logits_TE = self.gates[layer - 1](x_TH)
        expert_TK = router.select(logits_TE, Context())
        return Routing(expert_TK, router.weigh(logits_TE, expert_TK, Context()), logits_TE)


def read_ahead(model: PreTrainedModel, gates: nn.ModuleList, tokens: int = 1, everything: bool = False) -> Paging:
    """Let a model that is paged, and runs within :class:`PreGated`, read exactly what the next block will use.

    Its cache becomes two buffers for batches of ``tokens``: a block's experts and the next one's.

    Raises:
        OptionError: the model is not paged.
    """
    served = paging(model)
    served.store.clear(policy("lru:pool=global"))
    served.predictor = Chosen(served.blocks, gates, everything)
    served.width = max(block.num_experts for block in served.blocks)
    served.store.resize(buffers(served, tokens, everything))
    return served


def buffers(served: Paging, tokens: int, everything: bool = False) -> int:
    """Bytes of a block's experts and the next one's, for the pair of blocks where that is most."""
    largest = [max(tier.charge) for tier in served.store.layers]
    active = [min(block.num_experts, tokens * block.top_k) for block in served.blocks]
    ahead = [block.num_experts if everything else n for block, n in zip(served.blocks, active, strict=True)]
    pairs = range(len(largest) - 1)
    return max(active[n] * largest[n] + ahead[n + 1] * largest[n + 1] for n in pairs)


# -- modelled times


def pipelined(load: Sequence[float], compute: Sequence[float]) -> float:
    """Modelled time of one pass, by block: the first is loaded on demand, each later one while the one before it
    computes."""
    ahead = [*load[1:], 0.0]
    return sum(load[:1]) + sum(max(c, nxt) for c, nxt in zip(compute, ahead, strict=True))


def on_demand(load: Sequence[float], compute: Sequence[float]) -> float:
    """Modelled time of one pass in which every block waits for its own experts."""
    return sum(load) + sum(compute)
