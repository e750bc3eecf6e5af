"""A path predictor: from the tokens read so far, every layer's experts of the next step, before it is computed.

Shapes by suffix: B sequences, S positions, T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from moekit.errors import ProfileError
from moekit.profile import RoutingTrace
from moekit.run._predictors_seen import usage
from moekit.run.predict import Predictor, Ranked, Signal, ranked


class PathNet(nn.Module):
    """Token ids [B, S] -> logits [B, S, L, E]: one causal transformer over the last ``window`` positions."""

    def __init__(self, vocabulary: int, layers: int, experts: int, width: int = 64, depth: int = 2, window: int = 64):
        super().__init__()
        self.shape, self.window, self.vocabulary = (layers, experts), window, vocabulary
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(window, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.heads = nn.Linear(width, layers * experts)

    def forward(self, token_BS: Tensor) -> Tensor:
        length = token_BS.shape[1]
        x = self.token(token_BS.clamp(max=self.vocabulary - 1)) + self.place.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        return self.heads(self.body(x, mask=mask, is_causal=True)).unflatten(-1, self.shape)


class PathPredictor(Predictor):
    """Ranks by a net's probabilities, mean over the step's tokens; at most ``threshold`` or less is not predicted.

    A forecast is made once per step, when it is asked for before the first layer, and serves all layers of the step.
    """

    def __init__(self, net: PathNet, num_experts: Sequence[int], threshold: float = 0.0) -> None:
        self.net, self.num_experts, self.threshold = net.eval(), num_experts, threshold
        self._read: defaultdict[int, list[int]] = defaultdict(list)
        self._share_LE: np.ndarray | None = None

    def reset(self) -> None:
        self._read.clear()
        self._share_LE = None

    def predict(self, layer: int, signal: Signal, horizon: int) -> list[Ranked]:
        if layer < 0:
            self._share_LE = None if signal.token is None else self._forecast(signal)
        coming = range(layer + 1, min(layer + 1 + horizon, len(self.num_experts)))
        if self._share_LE is None:
            return [[] for _ in coming]
        found = []
        for later in coming:
            share_E = self._share_LE[later, : self.num_experts[later]]
            found.append([(expert, score) for expert, score in ranked(share_E, share_E) if score > self.threshold])
        return found

    def _forecast(self, signal: Signal) -> np.ndarray:
        assert signal.token is not None
        sequence_T = np.zeros(len(signal.token), int) if signal.sequence is None else signal.sequence
        parts = []
        for sequence in np.unique(sequence_T):
            new = signal.token[sequence_T == sequence]
            self._read[sequence] = [*self._read[sequence], *new.tolist()]
            parts.append(probabilities(self.net, np.asarray(self._read[sequence]), len(new)))
            self._read[sequence] = self._read[sequence][-self.net.window :]
        return np.concatenate(parts).mean(0)


@torch.no_grad()
def probabilities(net: PathNet, token_S: np.ndarray, last: int) -> np.ndarray:
    """Float [last, L, E] for the last positions of one sequence, each seen with at least half a window before it."""
    found: list[np.ndarray] = []
    start = max(len(token_S) - last, 0)
    while start < len(token_S):
        begin = max(0, min(start - net.window // 2, len(token_S) - net.window))
        stop = min(begin + net.window, len(token_S))
        logits = net(torch.from_numpy(token_S[None, begin:stop]).long())[0, start - begin :]
        found.append(logits.sigmoid().numpy())
        start = stop
    return np.concatenate(found)


def train_path(
    trace: RoutingTrace, *, steps: int = 300, batch: int = 16, rate: float = 3e-3, seed: int = 0, window: int = 64
) -> PathNet:
    """A net fitted to a trace's tokens and routing: binary cross-entropy on windows drawn by ``seed``.

    Raises:
        ProfileError: the trace was recorded without token ids, or no sequence has two tokens.
    """
    if trace.token is None:
        raise ProfileError("the trace has no token ids: record it from a live model")
    used_TLE, token_T = torch.from_numpy(usage(trace)), torch.from_numpy(trace.token).long()
    rows = [np.flatnonzero(trace.sequence == sequence) for sequence in np.unique(trace.sequence)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ProfileError("the trace has no sequence of two tokens or more: nothing can be learned from it")
    length = min(window, min(len(row) for row in rows))
    draw = np.random.default_rng(seed)
    weights = np.array([len(row) for row in rows], float)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = PathNet(int(token_T.max()) + 1, used_TLE.shape[1], used_TLE.shape[2], window=window)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(steps):
        picked = [rows[i] for i in draw.choice(len(rows), batch, p=weights / weights.sum())]
        starts = [draw.integers(len(row) - length + 1) for row in picked]
        at = np.stack([row[start : start + length] for row, start in zip(picked, starts, strict=True)])
        loss = nn.functional.binary_cross_entropy_with_logits(net(token_T[at]), used_TLE[at])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()
