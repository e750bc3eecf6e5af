"""Mixture-of-Mamba (n 176): do projections of one's own modality reach the dense model's loss in fewer steps?

Setting: sequences of 48 positions, six stretches of eight, texts and images in turn. A text is a walk over 12 symbols
along a chain of second order drawn once (3 likely followers for each pair); an image is patches of 8 numbers, each the
one before turned by one of four fixed rotations (drawn for the image) plus noise 0.1. A model of two state-space layers
(hidden 32) reads symbols through an embedding and patches through a linear map, and says the next position:
cross-entropy of a symbol, squared error of a patch, where the next one is of the same stretch. 250 steps of 8 sequences
at 5e-3 (AdamW).

Contestants: ``dense``; ``mixture`` (all four projections split by modality); ``without in`` and so on (all but that one
split); ``wide`` (dense, hidden 46: as many parameters as the mixture and twice the operations). Judged on 128 fresh
sequences every 25 steps; steps to the dense model's last loss are read off between those points, line by line.

Rule, written before the first run. `shown` if and only if in both modalities the 95 % t intervals over seeds say: dense
minus mixture in last loss lies above zero, and steps of the mixture over steps of the dense model lie below 1; and wide
minus mixture, summed over both, does not lie below zero (else parameters alone explain it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._seeds import each_seed, interval, over_seeds
from moekit.nn import MoekitConfig, MoekitModel
from moekit.nn.state_space import SPLIT

STRETCHES, STRETCH, SYMBOLS, FOLLOWERS, PATCH, TURNS, NOISE = 6, 8, 12, 3, 8, 4, 0.1
STEPS, BATCH, RATE, EVERY, TESTED = 250, 8, 5e-3, 25, 128
TEXT, IMAGE = "text", "image"
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture": {"modalities": 2},
    **{f"without {name}": {"modalities": 2, "split": [one for one in SPLIT if one != name]} for name in SPLIT},
    "wide": {"size": 46},
}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return last losses, steps to the dense model's loss, parameters. ``text`` is not used."""
    found = each_seed(seeds, advance, lambda seed: {name: measure(name, seed) for name in ARMS})
    figures = summary(found)
    setting = {"steps": STEPS, "batch": BATCH, "positions": STRETCHES * STRETCH, "layers": 2}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    rule = figures["rule"]
    return (
        all(rule[f"dense - mixture, {kind}"]["low"] > 0 for kind in (TEXT, IMAGE))
        and all(rule[f"steps of mixture over dense, {kind}"]["high"] < 1 for kind in (TEXT, IMAGE))
        and rule["wide - mixture, both"]["high"] >= 0
    )


def summary(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    last = [{name: {kind: arm[kind][-1] for kind in (TEXT, IMAGE)} for name, arm in one.items()} for one in found]
    rule: dict[str, Any] = {}
    for kind in (TEXT, IMAGE):
        rule[f"dense - mixture, {kind}"] = interval([one["dense"][kind] - one["mixture"][kind] for one in last])
        ratios = [
            reached(one["mixture"][kind], one["dense"][kind][-1]) / reached(one["dense"][kind], one["dense"][kind][-1])
            for one in found
        ]
        rule[f"steps of mixture over dense, {kind}"] = interval(ratios)
    both = [sum(one["wide"].values()) - sum(one["mixture"].values()) for one in last]
    rule["wide - mixture, both"] = interval(both)
    sizes = {name: {key: arm[key] for key in ("parameters", "active")} for name, arm in found[0].items()}
    return {"last_loss": over_seeds(last), "sizes": sizes, "rule": rule}


def reached(course: Sequence[float], level: float) -> float:
    """The step at which a loss, judged every ``EVERY`` steps from 0 on, comes down to a level; all steps if never."""
    for number, (before, after) in enumerate(pairwise(course)):
        if after <= level:
            return EVERY * (number + (before - level) / (before - after) if before > level else number)
    return float(STEPS)


class Reader(nn.Module):
    """Two state-space layers over symbols and patches."""

    def __init__(self, size: int = 32, **options: Any) -> None:
        super().__init__()
        attention = {"kind": "state-space", "state": 8, **options}
        sizes = {"vocab_size": SYMBOLS, "hidden_size": size, "head_dim": 8, "num_hidden_layers": 2}
        config = MoekitConfig(**sizes, attention=attention, feed_forward="nothing")
        self.body = MoekitModel(config)
        self.patch = nn.Linear(PATCH, size)
        self.symbol_out, self.patch_out = nn.Linear(size, SYMBOLS), nn.Linear(size, PATCH)

    def losses(self, symbol_BS: Tensor, patch_BSP: Tensor, image_BS: Tensor) -> dict[str, Tensor]:
        """Mean loss by modality, of positions whose next one is of their stretch."""
        embeds = torch.where(image_BS[..., None], self.patch(patch_BSP), self.body.embed_tokens(symbol_BS))
        hidden = self.body(inputs_embeds=embeds, modality_ids=image_BS.long(), use_cache=False).last_hidden_state
        inside = torch.arange(1, symbol_BS.shape[1]) % STRETCH != 0
        hidden, image = hidden[:, :-1][:, inside], image_BS[:, 1:][:, inside]
        symbol, patch = symbol_BS[:, 1:][:, inside], patch_BSP[:, 1:][:, inside]
        text = nn.functional.cross_entropy(self.symbol_out(hidden[~image]), symbol[~image])
        return {TEXT: text, IMAGE: nn.functional.mse_loss(self.patch_out(hidden[image]), patch[image])}

    def active(self) -> int:
        special = [m for m in self.modules() if hasattr(m, "active_parameters")]
        inside = sum(p.numel() for m in special for p in m.parameters())
        return sum(p.numel() for p in self.parameters()) - inside + sum(int(m.active_parameters()) for m in special)


class World:
    """What one seed's texts and images are drawn from."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.follow = torch.randint(0, SYMBOLS, (SYMBOLS, SYMBOLS, FOLLOWERS), generator=self.generator)
        normal = torch.randn(TURNS, PATCH, PATCH, generator=self.generator)
        self.turn = torch.linalg.qr(normal)[0]

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(symbols [B, S], patches [B, S, P], whether an image [B, S]); what a position is not is zero."""
        image = (torch.arange(STRETCHES)[None] + torch.randint(0, 2, (count, 1), generator=self.generator)) % 2 == 1
        flat = count * STRETCHES
        symbol = torch.randint(0, SYMBOLS, (flat, STRETCH), generator=self.generator)
        patch = torch.randn(flat, STRETCH, PATCH, generator=self.generator)
        noise, patch = NOISE * patch, patch.clone()
        turn = self.turn[torch.randint(0, TURNS, (flat,), generator=self.generator)]
        pick = torch.randint(0, FOLLOWERS, (flat, STRETCH), generator=self.generator)
        for step in range(1, STRETCH):
            if step > 1:
                symbol[:, step] = self.follow[symbol[:, step - 2], symbol[:, step - 1], pick[:, step]]
            patch[:, step] = torch.einsum("bpq,bq->bp", turn, patch[:, step - 1]) + noise[:, step]
        image_BS = image.repeat_interleave(STRETCH, dim=1)
        symbol, patch = symbol.view(count, -1), patch.view(count, STRETCHES * STRETCH, PATCH)
        return symbol * ~image_BS, patch * image_BS[..., None], image_BS


def measure(name: str, seed: int) -> dict[str, Any]:
    """Losses by modality every ``EVERY`` steps from 0 on, and sizes, of one contestant and seed."""
    world = World(seed)
    tests = world.draw(TESTED)
    torch.manual_seed(seed)
    model = Reader(**ARMS[name])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    course: dict[str, Any] = {TEXT: [], IMAGE: []}
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                for kind, value in model.losses(*tests).items():
                    course[kind].append(value.item())
        if step < STEPS:
            optimizer.zero_grad()
            torch.stack(list(model.losses(*world.draw(BATCH)).values())).sum().backward()
            optimizer.step()
    return course | {"parameters": sum(p.numel() for p in model.parameters()), "active": model.active()}
