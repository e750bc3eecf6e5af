"""Routing traces: which experts every token of some text went to, layer by layer, in the order it happened.

What caches, predictors, schedulers and placements are tried on. Shapes by suffix: T tokens in the order they were
computed, L MoE layers, K slots, E experts of the widest layer, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moekit.blocks import Observation, blocks
from moekit.errors import ProfileError
from moekit.profile.schema import PHASES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.profile.document import Profile

_DECODE = PHASES.index("decode")


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """``expert`` int [T, L, K], -1 where a slot is unused; ``weight`` float32 [T, L, K], their combine weights.

    ``sequence`` int [T]: which request a token belongs to; ``step`` int [T]: which forward call computed it (tokens of
    one step are routed together); ``decode`` bool [T]: computed one at a time after the prompt. ``num_experts`` by
    layer. ``token`` int [T] are token ids, ``domain`` int [T] indexes ``domains``. ``scores`` float16 [T, L, E] are
    router probabilities (softmax of the logits), ``inputs`` float16 [T, L, H] what each layer's router read. The
    optional ones are None where they were not recorded.
    """

    expert: np.ndarray
    weight: np.ndarray
    sequence: np.ndarray
    step: np.ndarray
    decode: np.ndarray
    num_experts: tuple[int, ...]
    domain: np.ndarray
    domains: tuple[str, ...] = ("text",)
    token: np.ndarray | None = None
    scores: np.ndarray | None = None
    inputs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.expert)

    @property
    def num_layers(self) -> int:
        return self.expert.shape[1]

    @classmethod
    def of_profile(cls, profile: Profile) -> RoutingTrace:
        """The traced tokens of a profile: a prompt is one step, each generated token one more.

        Raises:
            ProfileError: the profile holds no trace, or its layers differ in the number of slots traced.
        """
        if not len(profile.trace):
            raise ProfileError("the profile holds no trace of whole sequences: profile again with trace above 0")
        layers = list(profile.layers.values())
        expert = _stacked([layer.array("trace_expert") for layer in layers], -1)
        keep = (expert >= 0).any((1, 2))  # a token that was never generated has a row of -1
        sequence, phase = profile.trace["sequence"], profile.trace["phase"]
        trace = cls(
            expert=expert,
            weight=_stacked([layer.array("trace_weight") for layer in layers], 0.0),
            sequence=sequence,
            step=_steps(sequence, phase == _DECODE),
            decode=phase == _DECODE,
            num_experts=tuple(layer.num_experts for layer in layers),
            domain=profile.trace["domain"],
            domains=profile.domains,
        )
        return trace.take(np.flatnonzero(keep))

    def take(self, tokens: np.ndarray) -> RoutingTrace:
        """The named tokens (indices [T']), in that order."""
        names = ("expert", "weight", "sequence", "step", "decode", "domain", "token", "scores", "inputs")
        chosen: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[tokens] for name in names
        }
        return replace(self, **chosen)

    def of_domain(self, domain: str) -> RoutingTrace:
        """Only the tokens of one domain. Raises :class:`ProfileError` where there is no such domain."""
        if domain not in self.domains:
            raise ProfileError(f"the trace has no domain '{domain}': it has {', '.join(self.domains)}")
        return self.take(np.flatnonzero(self.domain == self.domains.index(domain)))

    def split(self, share: float = 0.5, seed: int = 0) -> tuple[RoutingTrace, RoutingTrace]:
        """Two traces of whole sequences, drawn by ``seed`` within each domain: to fit on, and to judge on."""
        rng, first = np.random.default_rng(seed), list[int]()
        for domain in range(len(self.domains)):
            own = np.unique(self.sequence[self.domain == domain])
            first += rng.permutation(own)[: round(share * len(own))].tolist()
        inside = np.isin(self.sequence, first)
        return self.take(np.flatnonzero(inside)), self.take(np.flatnonzero(~inside))

    @cached_property
    def requests(self) -> list[Request]:
        """What the layers asked for, in order: one request per step and layer (the reference string of caches)."""
        found, edges = list[Request](), np.flatnonzero(np.diff(self.step, prepend=-1, append=-1) != 0)
        for start, stop in pairwise(edges):
            for layer in range(self.num_layers):
                chosen = self.expert[start:stop, layer]
                experts, counts = np.unique(chosen[chosen >= 0], return_counts=True)
                found.append(Request(int(start), int(stop), layer, tuple(experts.tolist()), tuple(counts.tolist())))
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens ``start`` to ``stop`` of a trace at one layer: the distinct ``experts`` they use, by ``counts`` tokens."""

    start: int
    stop: int
    layer: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]


class TraceRecorder:
    """Records a live model's routing while the context is open; :meth:`trace` is what was seen so far.

    ``inputs`` and ``scores`` keep what routers read and their probabilities as well. Set ``domain`` between requests
    to name what follows; a forward call whose cache is empty (or that has none) begins new sequences.

    Raises:
        UnsupportedModelError: the model has no MoE block.
    """

    def __init__(self, model: PreTrainedModel, *, inputs: bool = False, scores: bool = False) -> None:
        self.model, self._wants = model, {"inputs": inputs, "scores": scores}
        self.blocks = blocks(model, shared=True)
        self.domain = "text"
        self._rows: list[dict[str, Any]] = []
        self._seen: list[Observation] = []
        self._step = self._first = -1
        self._sequences = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> TraceRecorder:
        self._hooks = [block.observe(self._seen.append).attach() for block in self.blocks]
        self._hooks.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._after, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen.clear()
        cache = kwargs.get("past_key_values")
        self._fresh = cache is None or not cache.get_seq_length()

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        ids = ids[:, -self._width(ids) :]
        rows, length = ids.shape
        if self._fresh:
            self._first, self._sequences = self._sequences, self._sequences + rows
        self._step += 1
        kept = self._kept(kwargs.get("attention_mask"), rows, length)
        parts = [self._part(seen, kept) for seen in self._seen]
        sequence = np.repeat(np.arange(self._first, self._first + rows), length)[kept]
        self._rows.append(
            {
                "parts": parts,
                "sequence": sequence,
                "step": np.full(len(sequence), self._step),
                "decode": np.full(len(sequence), not self._fresh),
                "token": ids.reshape(-1).cpu().numpy()[kept],
                "domain": self.domain,
            }
        )

    def _width(self, ids: Tensor) -> int:
        """New tokens per sequence in this call."""
        return self._seen[0].x_TH.shape[0] // ids.shape[0]

    def _kept(self, mask: Tensor | None, rows: int, length: int) -> np.ndarray:
        if mask is None or mask.dim() != 2:
            return np.arange(rows * length)
        return np.flatnonzero(mask[:, -length:].reshape(-1).cpu().numpy())

    def _part(self, seen: Observation, kept: np.ndarray) -> dict[str, np.ndarray]:
        part = {"expert": seen.routing.expert, "weight": seen.routing.weight.float()}
        if self._wants["scores"] and seen.routing.logits is not None:
            part["scores"] = torch.softmax(seen.routing.logits.float(), 1).half()
        if self._wants["inputs"] and seen.router_TH is not None:
            part["inputs"] = seen.router_TH.half()
        return {name: value.cpu().numpy()[kept] for name, value in part.items()}

    def trace(self) -> RoutingTrace:
        """What was recorded so far. Raises :class:`ProfileError` where nothing was."""
        if not self._rows:
            raise ProfileError("nothing was recorded: run the model inside the recorder's context")
        domains = tuple(dict.fromkeys(row["domain"] for row in self._rows))
        sizes = [len(row["sequence"]) for row in self._rows]

        def column(name: str) -> np.ndarray:
            return np.concatenate([row[name] for row in self._rows])

        def layers(name: str, fill: float) -> np.ndarray:
            every = range(len(self.blocks))
            return _stacked([np.concatenate([row["parts"][i][name] for row in self._rows]) for i in every], fill)

        optional = [name for name in ("scores", "inputs") if name in self._rows[0]["parts"][0]]
        return RoutingTrace(
            expert=layers("expert", -1).astype(np.int32),
            weight=layers("weight", 0.0),
            sequence=column("sequence"),
            step=column("step"),
            decode=column("decode"),
            num_experts=tuple(block.num_experts for block in self.blocks),
            domain=np.repeat([domains.index(row["domain"]) for row in self._rows], sizes),
            domains=domains,
            token=column("token"),
            **{name: layers(name, 0.0) for name in optional},
        )


def record(
    model: PreTrainedModel,
    prompts: Sequence[Tensor] | dict[str, Sequence[Tensor]],
    new_tokens: int = 0,
    *,
    inputs: bool = False,
    scores: bool = False,
) -> RoutingTrace:
    """The trace of reading each prompt (token ids [S]) and then generating ``new_tokens`` greedily, one by one.

    ``prompts`` may be a mapping of domain to prompts. With ``new_tokens`` 0 prompts are only read.
    """
    by_domain = prompts if isinstance(prompts, dict) else {"text": prompts}
    recorder = TraceRecorder(model, inputs=inputs, scores=scores)
    device = next(model.parameters()).device
    with recorder, torch.no_grad():
        for recorder.domain, own in by_domain.items():
            for prompt in own:
                ids = torch.as_tensor(prompt)[None].to(device)
                if not new_tokens:
                    model(input_ids=ids, use_cache=False)
                    continue
                # The last token is produced but never fed back.
                length = {"max_new_tokens": new_tokens + 1, "min_new_tokens": new_tokens + 1}
                model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
    return recorder.trace()


def _stacked(layers: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """[T, L, ...] from one array [T, W] per layer, padded to the widest."""
    width = max(array.shape[1] for array in layers)
    padded = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in layers]
    return np.stack(padded, axis=1)


def _steps(sequence: np.ndarray, decode: np.ndarray) -> np.ndarray:
    """Forward calls when prompts are read whole and tokens generated one by one, a sequence after the other."""
    begins = np.diff(sequence, prepend=-1) != 0
    return np.cumsum(begins | decode) - 1
