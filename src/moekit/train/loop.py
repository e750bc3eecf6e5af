"""One training loop for everything: transformers' Trainer underneath, a loss and a batch for each step on top.

The Trainer writes nothing: a run that shall survive a crash keeps its weights and moments in one safetensors file.
Same machine, one thread, same options: the same bits, interrupted or not.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moekit.errors import OptionError
from moekit.stream import pick_device
from moekit.train.groups import train_only
from moekit.train.options import TrainOptions
from moekit.train.sequences import Batch, Batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[[Any, Batch], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, batch) -> the loss, and the parts of it that are worth keeping a record of."""
RESUME = "resume.safetensors"
SAVE_EVERY = 100
"""Steps between two savings of a run that is given a folder."""


@dataclass(frozen=True)
class Record:
    """What training did: the loss of every step, and its parts by name. ``trained`` names the parameters."""

    trained: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """One more step."""
        self.losses.append(float(loss.detach()))
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(float(value.detach()))

    def last(self, count: int = 10) -> dict[str, float]:
        """Means over the last steps, for a report."""
        values = {"loss": self.losses, **self.parts}
        return {name: sum(v[-count:]) / len(v[-count:]) for name, v in values.items() if v}


def training_device(name: str) -> torch.device:
    """The one device on which this process trains: auto, cpu or cuda; under ``torchrun`` each has a GPU of its own.

    Raises:
        OptionError: an unknown or absent device, fewer GPUs than processes, or several GPUs for one, among which the
            Trainer would split batches.
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ:
        if processes > count:
            raise OptionError(f"{processes} processes for {count} GPUs: start one for each, or use --device cpu")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if count > 1:
        raise OptionError(
            f"training runs on one device, and {count} GPUs are visible: set CUDA_VISIBLE_DEVICES to one of them, or "
            "use --device cpu"
        )
    return device


def processes(device: torch.device) -> Any:
    """Who trains together (``torchrun``): accelerate's PartialState, the process group up; NCCL where on GPUs.

    Raises:
        OptionError: accelerate is missing.
    """
    try:
        from accelerate import PartialState
    except ImportError:
        raise OptionError("training needs accelerate, which is not installed: pip install 'moekit[train]'") from None
    return PartialState(cpu=device.type == "cpu")


def train(
    model: PreTrainedModel,
    loss: Loss,
    batches: Batches,
    options: TrainOptions,
    *,
    what: Sequence[str] = ("all",),
    folder: str | Path | None = None,
    record: Record | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Train the chosen parameters of a model in place; its mode and what needs gradients are put back at the end.

    ``folder`` keeps the state every :data:`SAVE_EVERY` steps and takes it up again (of several processes the first
    writes it, and all read it); ``before_step`` is told the number of each step (0 is the first), ``after_step`` how
    many are done after each update. Buffers that a model saves are part of the state. ``record`` is filled as it goes,
    where a caller wants to read it meanwhile.

    Raises:
        OptionError: accelerate is missing, the folder holds another run, or not the same for all processes, or the
            loss stops being a number.
    """
    ranks = processes(next(model.parameters()).device)
    from moekit.train._trainer import StepTrainer

    state = None if folder is None else Path(folder) / RESUME
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    names = train_only(model, what)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(parameters, options)
    record = Record() if record is None else record
    record.trained.extend(names)
    done = 0 if state is None else _resume(state, parameters, _held(model), optimizer, options, record)
    _agree(done, ranks.num_processes, state)

    def begins(step: int) -> None:
        if before_step is not None:
            before_step(step)

    def finished(step: int) -> None:
        if after_step is not None:
            after_step(step)
        if state is not None and ranks.is_main_process and (step % SAVE_EVERY == 0 or step == options.steps):
            _keep(state, step, parameters, _held(model), optimizer, options, record)
        if progress is not None:
            progress(step, options.steps)

    try:
        if done < options.steps:
            with tempfile.TemporaryDirectory() as scratch:
                job = _Job(loss, batches, options, done, record, begins, finished)
                StepTrainer(model, job, optimizer, scratch).train()
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(before.get(name, False))
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache
    return record


@dataclass(frozen=True)
class _Job:
    """What the Trainer is given: it begins at step ``done``, calls ``begins`` with the number of a step before it and
    ``finished`` with the number of steps done after it."""

    loss: Loss
    batches: Batches
    options: TrainOptions
    done: int
    record: Record
    begins: Callable[[int], None]
    finished: Callable[[int], None]


def _held(model: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers that a model saves, as they are now: moved to a device or shared among processes they become others."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _optimizer(parameters: Mapping[str, nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW; vectors are not decayed, stacks of them (biases of all experts) are, like matrices."""
    wide = [p for p in parameters.values() if p.dim() > 1]
    narrow = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": wide, "weight_decay": options.weight_decay}, {"params": narrow, "weight_decay": 0.0}]
    kept = [group for group in groups if group["params"]]
    fast, slow = options.betas
    return torch.optim.AdamW(kept, lr=options.learning_rate, betas=(fast, slow), eps=options.eps, fused=True)


def _keep(
    path: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    options: TrainOptions,
    record: Record,
) -> None:
    """Weights, moments and buffers under a temporary name, then one rename."""
    tensors = {f"buffer/{name}": buffer for name, buffer in buffers.items()}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter.detach()
        if parameter in optimizer.state:  # what no step has reached has no moments
            moments = optimizer.state[parameter]
            tensors |= {f"m/{name}": moments["exp_avg"], f"v/{name}": moments["exp_avg_sq"]}
            tensors[f"n/{name}"] = moments["step"]
    told = {"step": step, "options": asdict(options), "losses": record.losses, "parts": record.parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata={"run": json.dumps(told)})
    partial.replace(path)


def _resume(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    options: TrainOptions,
    record: Record,
) -> int:
    """Take up the run that a file holds, if any; returns the number of steps done."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        told = json.loads((file.metadata() or {}).get("run", "{}"))
    tensors = load_file(path)
    same = told.get("options") == json.loads(json.dumps(asdict(options)))
    if not same or {name for name in tensors if name.startswith("weight/")} != {f"weight/{n}" for n in parameters}:
        raise OptionError(f"{path} holds a run with other options or parameters: remove it or choose another folder")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        if f"m/{name}" not in tensors:
            continue
        optimizer.state[parameter] = {
            "step": tensors[f"n/{name}"].to(parameter.device),
            "exp_avg": tensors[f"m/{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"v/{name}"].to(parameter.device),
        }
    for name, buffer in buffers.items():
        buffer.data.copy_(tensors[f"buffer/{name}"])
    record.losses.extend(told["losses"])
    record.parts.update(told["parts"])
    return int(told["step"])


def _agree(done: int, count: int, state: Path | None) -> None:
    """OptionError where processes would go on from different steps: each would wait for the others for ever."""
    if count > 1 and state is not None:
        found: list[Any] = [None] * count
        torch.distributed.all_gather_object(found, done)
        if len(set(found)) > 1:
            raise OptionError(f"the processes find {state} at the steps {found}: give a folder that all of them see")
