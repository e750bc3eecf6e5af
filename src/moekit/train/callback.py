"""moekit's models under transformers' own Trainer: what has to be told that an optimizer step is over."""

from typing import Any

from transformers import TrainerCallback

from moekit.nn.layer import finish_step


class FinishStep(TrainerCallback):
    """``Trainer(..., callbacks=[FinishStep()])``: a bias ``correction`` moves, and counts over a step begin anew.

    Without it both stay as they are, since a model cannot know how many batches make a step. :func:`moekit.train.train`
    and ``moekit train`` do the same by themselves.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finish_step(kwargs["model"])
