"""The training loss of the embedded models, and the experts loop that trains fastest at their size, as they call it.

T tokens, K slots, E experts, H hidden, I intermediate, B rows, S positions.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from moekit.train.experts import run_experts

SORTED_EXPERTS = "moekit_lab_sorted"


def sorted_experts(
    self: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """An experts module's own computation, on tokens sorted by expert."""
    return run_experts(x_TH, index_TK, weight_TK, self.gate_up_proj, self.down_proj, _gated)


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def load_and_balance(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the load f [E] (sums to 1) and E * sum(f * p), which is 1 at perfect balance.

    Switch Transformer (Fedus et al. 2022), equations 4 to 6, for top-k and for one layer at a time: pooled over layers,
    an expert that is dead in one layer can hide behind a busy one in another.
    """
    num_experts = logits_TE.shape[-1]
    probability = logits_TE.float().softmax(-1)
    chosen = probability.topk(top_k, dim=-1).indices
    load = torch.bincount(chosen.reshape(-1), minlength=num_experts).float() / chosen.numel()
    return load, num_experts * (load * probability.mean(0)).sum()


def training_loss(
    model: PreTrainedModel, ids: torch.Tensor, weight: torch.Tensor, balance: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss (cross-entropy in nats under `weight`, plus `balance` per layer) and its parts."""
    routed = hasattr(model.config, "num_experts")
    extra = {"output_router_logits": True} if routed else {}
    output = model(input_ids=ids[:, :-1], use_cache=False, **extra)
    losses = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].reshape(-1), reduction="none")
    loss = (losses * weight.reshape(-1)).sum()
    figures = {"loss": loss.item()}
    if not routed:
        return loss, figures
    pairs = [load_and_balance(logits, model.config.num_experts_per_tok) for logits in output.router_logits]
    loads = torch.stack([load for load, _ in pairs]) * model.config.num_experts
    terms = torch.stack([term for _, term in pairs])
    figures |= {"balance": terms.mean().item(), "max_load": loads.max().item(), "min_load": loads.min().item()}
    return loss + balance * terms.sum(), figures
