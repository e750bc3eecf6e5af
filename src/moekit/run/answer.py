"""Asking a paged model something, and what the answer cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from moekit.errors import OptionError
from moekit.profile import RoutingTrace
from moekit.run.paging import Paging, paging
from moekit.run.replay import bound
from moekit.run.store import Counters
from moekit.stream import peak_rss


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one answer took. Times in seconds, ``peak`` is the operating system's figure for the whole process.

    ``first``: until the first new token; ``rest``: all others. ``bound``: hit rate of Belady's choice of victims on the
    same requests in a cache of the same number of experts, started empty; None where requests were not recorded.
    ``experts`` of ``all_experts`` fit in memory. ``disk``: of the store below, where ``counters`` are of a device's.
    """

    prompt_tokens: int
    new_tokens: int
    first: float
    rest: float
    counters: Counters
    experts: int
    all_experts: int
    bound: float | None
    peak: int
    disk: Counters | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first."""
        return (self.new_tokens - 1) / self.rest if self.rest > 0 else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Read from the slower tier, for each token that was computed."""
        read = self.counters.demand_bytes + self.counters.prefetch_bytes
        return read / max(self.prompt_tokens + self.new_tokens - 1, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "hit_rate": self.counters.hit_rate,
            "tokens_per_second": self.tokens_per_second,
            "bytes_per_token": self.bytes_per_token,
        }


class _Asked(StoppingCriteria):
    """Ends a generation when somebody says so."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.stop(), dtype=torch.bool, device=input_ids.device)


class _Clock(BaseStreamer):
    """Notes when tokens come and passes their text on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, say: Callable[[str], None] | None) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.times: list[float] = []
        self._ids: list[int] = []
        self._said = 0
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self._ids += value.reshape(-1).tolist()
        self._speak(whole=False)

    def end(self) -> None:
        self._speak(whole=True)

    def _speak(self, whole: bool) -> None:
        if self.say is None or self.tokenizer is None:
            return
        text = str(self.tokenizer.decode(self._ids, skip_special_tokens=True))
        # A character may take several tokens: until it is whole it is decoded as a replacement character.
        end = len(text) if whole or not text.endswith("\ufffd") else len(text.rstrip("\ufffd"))
        if end > self._said:
            self.say(text[self._said : end])
            self._said = end


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], chat: bool) -> Tensor:
    """Token ids [1, S] of a prompt as it stands, or as the model's own chat template has it: a text is the user's turn,
    messages are all turns so far.

    Raises :class:`OptionError` for an empty prompt, or a chat with a model that has no template.
    """
    if chat and not tokenizer.chat_template:
        raise OptionError("this model has no chat template: give the prompt as it stands, without --chat")
    if chat:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        found: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    else:
        found = tokenizer(prompt)
    if not found["input_ids"]:
        raise OptionError("the prompt is empty: say something")
    return torch.tensor(found["input_ids"]).reshape(1, -1)


def answer(
    model: PreTrainedModel,
    ids: Tensor,
    new_tokens: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Callable[[str], None] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> tuple[Tensor, Cost]:
    """At most ``new_tokens`` ids [N] that follow ``ids`` [1, S], and what they cost; ``say`` hears it as it comes.

    ``temperature`` 0 always takes the likeliest token; above it, tokens are drawn with ``seed`` from the likeliest that
    make up ``top_p`` of the probability. ``stop`` is asked after each token whether to end here.

    Raises:
        BudgetError: prompt and answer are longer than what memory was set aside for. CheckpointError: the disk failed.
    """
    served, clock = paging(model), _Clock(tokenizer, say)
    served.store.counters, kept = Counters(), served.history
    if served.below is not None:
        served.below.counters = Counters()
    ids = ids.to(model.device)
    served.history = []
    torch.manual_seed(seed)
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if stop is not None:
        how["stopping_criteria"] = StoppingCriteriaList([_Asked(stop)])
    started = time.perf_counter()
    try:
        made: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            streamer=clock,
            pad_token_id=model.generation_config.pad_token_id or 0,
            **how,
        )
        requests = served.history
    finally:
        served.history = kept
    first, last = clock.times[0], clock.times[-1]
    cost = Cost(
        prompt_tokens=ids.shape[1],
        new_tokens=len(clock.times),
        first=first - started,
        rest=last - first,
        counters=served.store.counters,
        experts=fitting(served),
        all_experts=sum(layer.num_experts for layer in served.store.layers),
        bound=belady(served, requests),
        peak=peak_rss(),
        disk=None if served.below is None else served.below.counters,
    )
    return made[0, ids.shape[1] :].cpu(), cost


def fitting(served: Paging) -> int:
    """How many experts fit into the store's budget, whichever they are."""
    layers = served.store.layers
    charges = sorted(charge for tier in layers for charge in tier.charge)
    return int(np.searchsorted(np.cumsum(charges[::-1]), served.store.budget, side="right"))


def belady(served: Paging, history: list[tuple[int, tuple[int, ...]]]) -> float | None:
    """Hit rate of Belady's policy on recorded requests, in a cache of as many experts.

    None if a layer's do not fit, or where stand-ins made what was asked for depend on what was there.
    """
    if served.stand_ins is not None:
        return None
    layers, width = len(served.store.layers), max(len(experts) for _, experts in history)
    steps = len(history) // layers
    if fitting(served) < width or steps * layers != len(history):
        return None
    expert = np.full((steps, layers, width), -1, dtype=np.int32)
    for at, (layer, experts) in enumerate(history):
        expert[at // layers, layer, : len(experts)] = experts
    none = np.zeros(steps, dtype=np.int64)
    trace = RoutingTrace(
        expert=expert,
        weight=(expert >= 0).astype(np.float32),
        sequence=none,
        step=np.arange(steps),
        decode=none.astype(bool),
        num_experts=tuple(tier.num_experts for tier in served.store.layers),
        domain=none,
    )
    return bound(trace, fitting(served)).hit_rate
