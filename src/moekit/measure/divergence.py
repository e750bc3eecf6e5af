"""How far one model is from another on the same tokens: KL divergence, top-1 agreement, bits per byte of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import torch
from torch import Tensor

from moekit.measure._interval import Interval
from moekit.measure._logits import predicted, rows
from moekit.measure._runner import Runner
from moekit.measure._text import Windows


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Two models on the same text; a is the reference, b what became of it.

    `kl` is KL(a || b) in nats per predicted token, `agreement` the share of positions at which both rank the same token
    first, `nll_a` and `nll_b` the losses in nats per token. Bits per byte are None where the bytes are not known.
    `domains` has the same for each domain of the text, empty where it has only one.
    """

    kl: Interval
    agreement: Interval
    nll_a: Interval
    nll_b: Interval
    tokens: int
    bits_per_byte_a: Interval | None = None
    bits_per_byte_b: Interval | None = None
    domains: Mapping[str, "Divergence"] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain floats for a receipt: each mean `x` with its interval as `x_low` and `x_high` (None where not known);
        `domains` with the same of each, where there are several."""
        found: dict[str, Any] = {}
        for name, interval in (
            ("kl", self.kl),
            ("agreement", self.agreement),
            ("nll_source", self.nll_a),
            ("nll_output", self.nll_b),
            ("bits_per_byte_source", self.bits_per_byte_a),
            ("bits_per_byte_output", self.bits_per_byte_b),
        ):
            found[name] = interval.mean if interval else None
            found |= {f"{name}_low": interval.low, f"{name}_high": interval.high} if interval else {}
        found["tokens"] = self.tokens
        if self.domains:
            found["domains"] = {name: one.as_dict() for name, one in self.domains.items()}
        return found


@torch.no_grad()
def compare(
    runner_a: Runner,
    runner_b: Runner,
    batches: Sequence[dict[str, Tensor]] | Windows,
    *,
    num_bytes: Sequence[float] | None = None,
) -> Divergence:
    """Run both models over the same batches, one batch of logits of each alive at a time.

    `batches` hold `input_ids` [B, S] and, where padded, `attention_mask`; padding counts nowhere. `num_bytes` gives the
    bytes each row of each batch predicts (:class:`Windows` brings them along, and the domain of each row). Intervals
    resample the rows. Raises ValueError for batches without a token to predict or models with different vocabularies.
    """
    domains: Sequence[str] = ()
    if isinstance(batches, Windows):
        num_bytes, domains, batches = batches.num_bytes, batches.domains, batches.batches
    sums: list[Tensor] = []
    for batch, logits_a, logits_b in zip(batches, runner_a.forward(batches), runner_b.forward(batches), strict=True):
        sums.append(_row_sums(batch, logits_a, logits_b))
    total = torch.cat(sums) if sums else torch.zeros(0, 5, dtype=torch.float64)
    if float(total[:, 0].sum()) == 0:
        raise ValueError("no token to predict: the batches hold no two adjacent real tokens")
    sizes = None if num_bytes is None else torch.tensor(list(num_bytes), dtype=torch.float64)
    parts = {}
    for name in dict.fromkeys(domains):
        rows_of = torch.tensor([domain == name for domain in domains])
        if float(total[rows_of, 0].sum()) > 0:
            parts[name] = _summed(total[rows_of], None if sizes is None else sizes[rows_of])
    return replace(_summed(total, sizes), domains=parts if len(parts) > 1 else {})


def _summed(total: Tensor, num_bytes: Tensor | None) -> Divergence:
    """Rows of :func:`_row_sums` as means with intervals; bits per byte where the rows stand for any bytes."""
    tokens, kl, agree, nll_a, nll_b = total.T.tolist()
    sizes = None if num_bytes is None or float(num_bytes.sum()) <= 0 else num_bytes.tolist()
    return Divergence(
        kl=Interval.bootstrap(kl, tokens),
        agreement=Interval.bootstrap(agree, tokens),
        nll_a=Interval.bootstrap(nll_a, tokens),
        nll_b=Interval.bootstrap(nll_b, tokens),
        tokens=int(sum(tokens)),
        bits_per_byte_a=None if sizes is None else Interval.bootstrap([n / log(2) for n in nll_a], sizes),
        bits_per_byte_b=None if sizes is None else Interval.bootstrap([n / log(2) for n in nll_b], sizes),
    )


def _row_sums(batch: dict[str, Tensor], logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """float64 [B, 5] per row: predicted tokens, and the sums of KL, agreement and both losses over them."""
    if logits_a.shape != logits_b.shape:
        raise ValueError(f"logits of shapes {tuple(logits_a.shape)} and {tuple(logits_b.shape)} cannot be compared")
    where, target = predicted(batch)
    flat = torch.zeros(where.numel(), 5, dtype=torch.float64)
    for (index, logp_a), (_, logp_b) in zip(rows(logits_a, where), rows(logits_b, where), strict=True):
        goal = target.reshape(-1)[index, None]
        gap = (logp_a - logp_b).masked_fill(logp_a == -torch.inf, 0)  # a token a cannot say has p log p = 0
        flat[index] = torch.stack(
            [
                torch.ones(len(index), dtype=torch.float64),
                (logp_a.exp() * gap).sum(1),
                (logp_a.argmax(1) == logp_b.argmax(1)).double(),
                -logp_a.gather(1, goal)[:, 0],
                -logp_b.gather(1, goal)[:, 0],
            ],
            dim=1,
        )
    return flat.view(*where.shape, 5).sum(1)
