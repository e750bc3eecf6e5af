"""The training loss of the embedded models, and the experts loop that trains fastest at their size.

T tokens, K slots, E experts, H hidden, I intermediate, B rows, S positions.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

SORTED_EXPERTS = "moekit_lab_sorted"


def sorted_experts(
    self: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Run experts on tokens sorted by expert. `unbind` gives one gradient buffer per stack, indexing one per expert."""
    order = torch.argsort(index_TK.reshape(-1), stable=True)
    token = order // index_TK.shape[1]
    counts = torch.bincount(index_TK.reshape(-1), minlength=self.num_experts).tolist()
    outputs = []
    inputs = x_TH.index_select(0, token).split(counts)
    for x, gate_up, down in zip(inputs, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    weighted = torch.cat(outputs) * weight_TK.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(x_TH).index_add(0, token, weighted)


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
