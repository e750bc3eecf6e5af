"""Greedy generation after each prompt, so that decoding is observed apart from reading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moekit.profile._choose import Chosen, decode_cells, prefill_cells
from moekit.profile._sequences import Batch, TokenSequence
from moekit.profile._view import Cells
from moekit.profile._watch import Watch


class Generation:
    """Runs batches of equal-length prompts and follows which of their sequences still speak."""

    def __init__(
        self,
        model: Any,
        watch: Watch,
        sequences: Sequence[TokenSequence],
        chosen: Chosen,
        num_domains: int,
        tokens: int,
    ) -> None:
        self.model, self.watch, self.tokens = model, watch, tokens
        self._cells_of = (sequences, chosen, num_domains)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
        self._number, self._step, self._alive = 0, -1, list[bool]()
        self._cells = Cells(torch.zeros(0, dtype=torch.int64))

    def run(self, batches: Sequence[Batch], tell: Callable[[int, int], None]) -> None:
        """Observe the prompts as prefill and ``tokens`` steps after each as decode."""
        device = next(self.model.parameters()).device
        with self.watch.attached(lambda: (self._number, self._cells)), torch.no_grad():
            for self._number, batch in enumerate(batches):
                self._step, self._alive = -1, [True] * len(batch.number)
                hook = self.model.register_forward_pre_hook(self._before_step(batch), with_kwargs=True)
                try:
                    # One token more than is observed: the last one is produced but never fed back.
                    self.model.generate(
                        batch.ids.to(device),
                        attention_mask=batch.mask.long().to(device),
                        do_sample=False,
                        num_beams=1,
                        max_new_tokens=self.tokens + 1,
                        pad_token_id=self.model.generation_config.pad_token_id or 0,
                        use_cache=True,
                    )
                finally:
                    hook.remove()
                tell(self._number + 1, len(batches))

    def _before_step(self, batch: Batch) -> Callable[..., None]:
        def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._step < 0:
                self._cells = prefill_cells(batch, *self._cells_of)
            else:
                fed = kwargs["input_ids"][:, -1].tolist()
                self._cells = decode_cells(batch, *self._cells_of, self._step, self._alive)
                self._alive = [alive and token not in self._ends for alive, token in zip(self._alive, fed, strict=True)]
            self._step += 1

        return hook
