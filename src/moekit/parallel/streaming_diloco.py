"""Streaming DiLoCo: workers train apart and exchange fragments in turn, in 4 bits, while they train on.

Paper: Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch, 2025
    (n 127, arXiv 2501.18512).
Method: P fragments of ``layers`` layers each, strided; fragment p is exchanged when (t - p H / P) mod H = 0: the mean
    over workers of D = theta_old - theta_w, in FP4 E3M0 and added in float32, is the gradient of SGD with Nesterov
    momentum on theta_old; tau (``delay``) steps later theta_w <- a theta_w + (1 - a) theta_new, a = ``mix``.
Uses: parallel.outer, parallel._outer_fragments, parallel._codec
Differs: 4-bit numbers have a scale for every 128 (the paper does not say); exchanged by gathering, without a server.
    After the last step what was trained since the last exchange becomes the plain mean.
Claim: as good as data-parallel training from 35M to 4B parameters with two orders of magnitude less bandwidth.
Shown: lab.experiments.streaming_diloco
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moekit.parallel._codec import codec
from moekit.parallel._outer_fragments import Averaged, OuterStep, by_layers
from moekit.parallel._outer_link import Link
from moekit.parallel.outer import OuterSync


@dataclass(frozen=True, kw_only=True)
class StreamingDiLoCo:
    """``every`` is H. With ``layers`` of all layers, ``delay`` 0, ``mix`` 0 and ``codec`` float32 it is DiLoCo."""

    every: int = 100
    layers: int = 3
    delay: int = 1
    mix: float = 0.5
    learning_rate: float = 0.4
    momentum: float = 0.9
    codec: str = "fp4"

    def attach(
        self, model: nn.Module, link: Link, *, folder: str | Path | None = None, save_every: int = 100
    ) -> OuterSync:
        """Take the first worker's weights, and synchronise when called after each step.

        Raises ``OptionError`` for values out of range.
        """
        outer = OuterStep(learning_rate=self.learning_rate, momentum=self.momentum, mix=self.mix)
        link.share([*model.parameters(), *model.buffers()])
        groups = by_layers(dict(model.named_parameters()), self.layers)
        fragments = [
            Averaged(f"fragment {i}", list(group.values()), outer, codec(self.codec), i * self.every // len(groups))
            for i, group in enumerate(groups)
        ]
        return OuterSync(fragments, link, every=self.every, delay=self.delay, folder=folder, save_every=save_every)
