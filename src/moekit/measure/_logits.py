"""Per-token quantities from logits, in float64 and in chunks, so that a large vocabulary never doubles in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22


def predicted(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(bool [B, S-1], int64 [B, S-1]): at which positions a real token follows a real token, and which one it is."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return mask[:, :-1] & mask[:, 1:], ids[:, 1:]


def rows(logits_BSV: Tensor, where_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (index into the flattened [B, S-1] positions, log-probabilities [n, V] in float64) of the positions."""
    flat = logits_BSV[:, :-1].reshape(-1, logits_BSV.shape[-1])
    index = where_BS.reshape(-1).nonzero()[:, 0]
    for part in index.split(max(1, _CHUNK_ELEMENTS // flat.shape[-1])):
        yield part, flat[part.to(flat.device)].double().log_softmax(-1).cpu()


def token_nll(logits_BSV: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood in nats, float64 [B, S-1]; 0 where nothing is predicted."""
    where, target = predicted(batch)
    nll = torch.zeros(where.numel(), dtype=torch.float64)
    for index, logp in rows(logits_BSV, where):
        nll[index] = -logp.gather(1, target.reshape(-1)[index, None])[:, 0]
    return nll.view(where.shape)
