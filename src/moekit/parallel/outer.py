"""Training across slow links: workers train apart and exchange fragments of their weights now and then, while training.

:class:`OuterSync` is what a training loop calls after every step (``train(..., after_step=sync)``). The methods of
papers say which fragments there are and how copies become one (:mod:`_outer_fragments`), the link carries them
(:mod:`_outer_link`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekit.errors import OptionError
from moekit.parallel._errors import ParallelError
from moekit.parallel._outer_fragments import Fragment
from moekit.parallel._outer_link import Link, Pending

_KEPT = 2
"""States of the past that are kept: training may have been stopped after this state was saved and before its own."""


class OuterSync:
    """Exchanges every fragment once in ``every`` steps (H), beginning at its offset, and uses it ``delay`` steps later.

    A fragment's exchange begins after each step t > 0 with (t - offset) mod H = 0. Between beginning and use training
    goes on. All workers make one of these with equal arguments and weights, and call it after every step.

    ``folder`` (one per worker) keeps the state every ``save_every`` steps, exchanges in flight included, and is taken
    up when this is made; a loop that takes up its own state at the same step goes on bit for bit. ``then`` is called
    after every step, before that state is kept. Raises :class:`OptionError` for a schedule that cannot be,
    :class:`ParallelError` where workers differ or one is lost.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        link: Link,
        *,
        every: int,
        delay: int = 0,
        folder: str | Path | None = None,
        save_every: int = 100,
        then: Callable[[int], None] | None = None,
    ) -> None:
        if every < 1 or not 0 <= delay < every:
            raise OptionError(f"every={every} steps with delay={delay}: the delay must be from 0 to {every - 1}")
        if not fragments or not all(0 <= fragment.offset < every for fragment in fragments):
            offsets = [fragment.offset for fragment in fragments]
            raise OptionError(f"offsets {offsets} of the fragments: give at least one, all from 0 to {every - 1}")
        self.fragments, self.link, self.every, self.delay = list(fragments), link, every, delay
        self.save_every, self._then = save_every, then
        self._folder = None if folder is None else Path(folder)
        self._flying: dict[int, tuple[int, Tensor, Pending]] = {}
        self._begun = [0] * len(self.fragments)
        self._packed: dict[int, tuple[int, Tensor]] = {}
        self._loaded = self._load()
        self._step: int | None = None

    def __call__(self, step: int) -> None:
        """After training step ``step`` (1 is the first)."""
        self._enter(step - 1)
        for at, fragment in enumerate(self.fragments):
            if at in self._flying and self._flying[at][0] + self.delay == step:
                fragment.use(self._flying.pop(at)[2], last=False)
            if (step - fragment.offset) % self.every == 0:
                self._begin(at, step, fragment.pack())
                if self.delay == 0:
                    fragment.use(self._flying.pop(at)[2], last=False)
        self._step = step
        if self._then is not None:
            self._then(step)
        if self._folder is not None and step % self.save_every == 0:
            self._save(step)

    def finish(self, step: int) -> None:
        """Call it once after the last step: all workers then hold the same weights.

        What is in flight is used, and what was trained since its last exchange becomes the plain mean.
        """
        self._enter(step)
        if self._folder is not None and step % self.save_every:
            self._save(step)
        for at, (begun, _, pending) in sorted(self._flying.items()):
            self.fragments[at].use(pending, last=begun == step)
        self._flying = {}
        for at, fragment in enumerate(self.fragments):
            if self._begun[at] < step:
                self._begin(at, step, fragment.pack())
                fragment.settle(self._flying.pop(at)[2])

    def _begin(self, at: int, step: int, packed: Tensor) -> None:
        if not bool(torch.isfinite(packed).all()):
            raise OptionError(
                f"worker {self.link.rank} has weights in '{self.fragments[at].name}' that are not finite at step "
                f"{step}: lower its learning rate"
            )
        self._begun[at] = step
        self._flying[at] = (step, packed, self.fragments[at].send(packed, self.link))

    def _enter(self, done: int) -> None:
        """The first call meets the other workers and sends again what was in flight; later ones count along."""
        if self._step is None:
            if done != self._loaded:
                where = "no folder was given" if self._folder is None else f"{self._folder} is after {self._loaded}"
                raise OptionError(f"training goes on after step {done}, but {where}: resume both or start both anew")
            self._meet(done)
            for at, (begun, packed) in sorted(self._packed.items(), key=lambda item: (item[1][0], item[0])):
                self._begin(at, begun, packed)
            self._packed, self._step = {}, done
        if self._step != done:
            raise OptionError(f"the loop did {done} steps, this state is after {self._step}: call it after every step")

    def _meet(self, done: int) -> None:
        common = hashlib.sha256()
        for fragment in self.fragments:
            if "common" in fragment.state():
                common.update(fragment.state()["common"].numpy())
        facts = (done, _number(hashlib.sha256(self._plan().encode())), _number(common))
        rows = self.link.agree(facts)
        for what, column in zip(
            ("steps done", "schedule or fragments", "common weights"), zip(*rows, strict=True), strict=True
        ):
            if len(set(column)) > 1:
                told = f" ({', '.join(map(str, column))})" if what == "steps done" else ""
                raise ParallelError(f"workers differ in {what}{told}: start all from the same model, options and state")

    def _plan(self) -> str:
        """What must be equal everywhere."""
        parts = [[type(f).__name__, f.name, f.offset, f.nbytes] for f in self.fragments]
        return json.dumps([self.every, self.delay, parts])

    def _save(self, step: int) -> None:
        assert self._folder is not None
        tensors = {f"{at}/state/{n}": t for at, f in enumerate(self.fragments) for n, t in f.state().items()}
        tensors |= {f"{at}/flying": packed for at, (_, packed, _) in self._flying.items()}
        flying = {at: begun for at, (begun, _, _) in self._flying.items()}
        told = json.dumps({"step": step, "plan": self._plan(), "begun": self._begun, "flying": flying})
        path = self._folder / f"outer-{step:08d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, partial, {"run": told})
        partial.replace(path)
        for old in sorted(path.parent.glob("outer-*.safetensors"))[:-_KEPT]:
            old.unlink()

    @torch.no_grad()
    def _load(self) -> int:
        """Take up the newest state of the folder, if any; returns the steps done by then."""
        files = [] if self._folder is None else sorted(self._folder.glob("outer-*.safetensors"))
        if not files:
            return 0
        with safe_open(files[-1], framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("run", "{}"))
        if told.get("plan") != self._plan():
            raise OptionError(
                f"{files[-1]} holds a run with another schedule or other fragments: choose another folder"
            )
        tensors = load_file(files[-1])
        for at, fragment in enumerate(self.fragments):
            for name, tensor in fragment.state().items():
                tensor.copy_(tensors[f"{at}/state/{name}"])
        self._begun = told["begun"]
        self._packed = {int(at): (begun, tensors[f"{at}/flying"]) for at, begun in told["flying"].items()}
        return int(told["step"])


def _number(digest: hashlib._Hash) -> int:
    return int.from_bytes(digest.digest()[:7], "big")
