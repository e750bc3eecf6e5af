"""transformers' Trainer as moekit uses it: one batch per step by its number, our loss, nothing written or printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from moekit.errors import OptionError
from moekit.nn.flow import gathered

if TYPE_CHECKING:
    from moekit.train.loop import _Job


class _Steps(Dataset):
    """Item i is batch i of the rest of the run; a step takes ``accumulate`` of them."""

    def __init__(self, job: _Job) -> None:
        self.job = job

    def __len__(self) -> int:
        return (self.job.options.steps - self.job.done) * self.job.options.accumulate

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return dict(self.job.batches(self.job.done * self.job.options.accumulate + index))


class _Finished(TrainerCallback):
    """Sets the random state before a step and tells of it before and afterwards."""

    def __init__(self, job: _Job) -> None:
        self.job = job

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(self.job.options.seed * 1_000_003 + self.job.done + state.global_step)
        self.job.begins(self.job.done + state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job.finished(self.job.done + state.global_step)


class StepTrainer(Trainer):
    """Trains from step ``job.done`` to the end of its options."""

    def __init__(self, model: Any, job: _Job, optimizer: torch.optim.Optimizer, scratch: str) -> None:
        options = job.options
        schedule = LambdaLR(optimizer, lambda step: options.factor(min(step + job.done, options.steps)))
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=options.steps - job.done,
            max_grad_norm=options.max_norm,
            gradient_accumulation_steps=options.accumulate,
            bf16=options.dtype == "bfloat16",
            seed=options.seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        self._job = job
        self._figures: list[tuple[torch.Tensor, Mapping[str, torch.Tensor]]] = []
        steps = _Steps(job)
        super().__init__(
            model, arguments, train_dataset=steps, optimizers=(optimizer, schedule), callbacks=[_Finished(job)]
        )
        self.model_accepts_loss_kwargs = False
        for talkative in (PrinterCallback, ProgressCallback):
            self.remove_callback(talkative)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches in order, as they are."""
        return DataLoader(_Steps(self._job), batch_size=None, shuffle=False)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The job's loss; parametrised weights are computed once per step."""
        batch = {name: value.to(self.args.device) for name, value in inputs.items()}
        with parametrize.cached():
            loss, parts = self._job.loss(model, batch)
        if not torch.isfinite(loss):
            step = self._job.done + self.state.global_step
            raise OptionError(
                f"the loss at step {step} is {float(loss.detach())}: lower learning_rate, or check the model's weights"
            )
        self._figures.append((loss, parts))
        if len(self._figures) == self._job.options.accumulate:
            self._tell()
        return loss

    def _tell(self) -> None:
        """One step into the record: means over its batches, and over the processes that share them."""
        figures, self._figures = self._figures, []
        names = figures[0][1]
        parts = {name: torch.stack([own[name].detach().float() for _, own in figures]).mean() for name in names}
        loss = torch.stack([loss.detach() for loss, _ in figures]).mean()
        if self.args.world_size > 1:
            means = gathered(torch.stack([one.to(loss.device) for one in (loss, *parts.values())]))
            loss, *rest = means / self.args.world_size
            parts = dict(zip(parts, rest, strict=True))
        self._job.record.add(loss, parts)
