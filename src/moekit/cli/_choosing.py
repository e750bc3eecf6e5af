"""What methods that search are measured by on the command line: the divergence on text, or a task's wrong answers."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli._options import Machine
from moekit.errors import OptionError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.plan import Plan, Planner
    from moekit.profile import Profile

Examples = list[tuple[str, str]]


def check_task(planners: "Sequence[Planner]", task: Path | None) -> Examples | None:
    """The examples of the task, where one is given. OptionError unless there is one exactly where it is searched by."""
    counts, diverges = (any(f"fitness={kind}" in one.spec for one in planners) for kind in ("error", "divergence"))
    if task is None:
        if counts:
            raise OptionError("fitness=error counts wrong answers: give --task FILE of prompts and answers")
        return None
    if not counts or diverges:
        raise OptionError("--task is searched by methods that count wrong answers: say so, as in eep:fitness=error")
    from moekit.compress import read_examples

    return read_examples(task)


class Chooser:
    """The loss by which methods that search choose, made when first asked: wrong answers to a task's prompts where
    there are some, else the divergence on half of the text a profile kept aside."""

    def __init__(
        self, checkpoint: "Checkpoint", profile: "Profile | None", machine: Machine, examples: Examples | None = None
    ) -> None:
        self._checkpoint, self._profile, self._machine, self._examples = checkpoint, profile, machine, examples
        self._loss: Any = None

    @property
    def read(self) -> bool:
        """Whether anything was chosen by text that was kept aside."""
        return self._loss is not None and self._examples is None

    def __call__(self, plan: "Plan") -> float:
        if self._loss is None:
            self._loss = self._wrong_answers() if self._examples else self._divergence()
        return self._loss(plan)

    def _wrong_answers(self) -> Any:
        from moekit.compress import task_error

        assert self._examples is not None
        return task_error(self._checkpoint, self._examples, **asdict(self._machine))

    def _divergence(self) -> Any:
        from moekit.plan import live_loss, split_held_out

        if self._profile is None:
            raise OptionError("this method searches by a loss, which needs text: give --text FILE or --profile FILE")
        choose, _ = split_held_out(self._profile.held_out)
        loss = live_loss(self._checkpoint, choose, **asdict(self._machine))
        if loss is None:
            raise OptionError("this method searches by a loss, but the profile kept no text aside: profile more text")
        return loss
