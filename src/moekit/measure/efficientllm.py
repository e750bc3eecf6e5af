"""EfficientLLM: the six figures of an efficiency comparison, for one model and one workload.

Paper: EfficientLLM: Efficiency in Large Language Models, 2025 (n 61).
Method: AMU = time-mean of the memory used; PCU = mean of actual over peak compute; AL = mean seconds per request; IT =
    tokens per second (inference); AEC = time-mean power; MCR = (size / size_c) * (performance_c / performance).
Uses: stream, measure
Differs: AMU is the resident memory of the process, beside the bytes of the model's tensors; PCU and AEC say "not
    measured" where no counter exists (PCU never has one here; AEC reads the powercap counters of Linux). TT and ST, the
    same throughput divided by parameters, are for training and are given by the caller's own timing. No score is
    normalised over a set of models.
Claim: no method dominates; a sparse 1.5B x 8 model has a lower loss than dense models of 1.5B and 3B, and needs more
    memory.
Shown: lab.experiments.efficientllm. Not here: after 200 steps of 512 tokens the sparse model leads the dense one of
    equal active size by 0.09 bits per byte, within the noise of three seeds (-0.02 to 0.20), at 2.6 times its bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.errors import OptionError, UnsupportedModelError
from moekit.measure._interval import Interval
from moekit.measure._runner import Runner
from moekit.stream import LoadedModel, open_model
from moekit.stream.memory import rss

NOT_MEASURED = "not measured"
_COUNTERS = "/sys/class/powercap"
Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """One model on one workload. Parameters ``total`` and ``active`` per token, ``tensor_bytes`` in memory, ``amu``
    bytes resident in the mean over the run, ``al`` seconds per request (a batch), ``it`` tokens per second, ``aec``
    watts (None: no counter), ``mcr`` against a reference (None: none was given)."""

    total: int
    active: int
    tensor_bytes: int
    amu: float
    al: Interval
    it: float
    aec: float | None = None
    mcr: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """By the paper's abbreviations; what was not measured says so."""
        return {
            "parameters_total": self.total,
            "parameters_active": self.active,
            "tensor_bytes": self.tensor_bytes,
            "AMU_bytes": self.amu,
            "PCU": NOT_MEASURED,
            "AL_seconds": {"mean": self.al.mean, "low": self.al.low, "high": self.al.high},
            "IT_tokens_per_second": self.it,
            "AEC_watts": NOT_MEASURED if self.aec is None else self.aec,
            "MCR": NOT_MEASURED if self.mcr is None else self.mcr,
        }


def mcr(size: float, performance: float, size_c: float, performance_c: float) -> float:
    """The compression ratio times the performance kept: (size / size_c) * (performance_c / performance).

    Performance is better when higher: of a loss, give its reciprocal. Above 1 is not good in itself: a quarter of the
    size at half the performance has 2. Raises :class:`OptionError` for anything but positive numbers.
    """
    if min(size, performance, size_c) <= 0 or performance_c < 0:
        raise OptionError(
            f"sizes {size:g} and {size_c:g} and performance {performance:g} must be positive, {performance_c:g} not "
            "negative"
        )
    return size / size_c * (performance_c / performance)


def efficiency_report(
    model: str | os.PathLike[str] | Checkpoint | Runner | nn.Module,
    workload: Batches,
    *,
    rounds: int = 1,
    reference: tuple[float, float, float] | None = None,
    device: str = "auto",
    max_ram: int | float | str | None = None,
) -> Efficiency:
    """Run a workload (batches with ``input_ids``), once to warm up and ``rounds`` times to measure.

    ``reference`` is (bytes, performance, this model's performance), the first two of the model compared with.
    Raises :class:`OptionError` for an empty workload, and as ``open_model`` does.
    """
    if not workload or rounds < 1:
        raise OptionError("there is nothing to run: give at least one batch of tokens and one round")
    runner = _runner(model, device, max_ram)
    for _ in runner.forward([dict(workload[0])]):
        pass
    seconds: list[float] = []
    resident: list[int] = []
    with _Meter() as meter:
        for _ in range(rounds):
            for batch in workload:
                begun = time.perf_counter()
                for _ in runner.forward([dict(batch)]):
                    pass
                seconds.append(time.perf_counter() - begun)
                resident.append(rss())
    (total, active), size = parameters(runner.model), tensor_bytes(runner.model)
    tokens = rounds * sum(_tokens(batch) for batch in workload)
    spent = sum(seconds)
    kept = None if reference is None else mcr(reference[0], reference[1], size, reference[2])
    return Efficiency(
        total=total,
        active=active,
        tensor_bytes=size,
        amu=sum(r * s for r, s in zip(resident, seconds, strict=True)) / spent,
        al=Interval.bootstrap(seconds),
        it=tokens / spent,
        aec=meter.watts,
        mcr=kept,
    )


def parameters(model: nn.Module) -> tuple[int, int]:
    """(total, active for one token): what a token's K of E experts leave out is not active. Tied weights count once,
    and so do the weights that packed experts stand for, whatever they are stored in."""
    total = sum(p.numel() for p in model.parameters())
    try:
        found = blocks(model)
    except UnsupportedModelError:
        return total, total
    idle = 0
    for block in found:
        stored = sum(p.numel() for p in block.experts.parameters())
        bank = block.bank()
        rows = bank.intermediate_size * (3 if bank.activation.gated else 2)
        routed = max(rows * bank.hidden_size * bank.num_experts, 0 if _packed(block.experts) else stored)
        total += routed - stored
        idle += routed * (block.num_experts - min(block.top_k, block.num_experts)) // block.num_experts
    return total, total - idle


def _packed(experts: nn.Module) -> bool:
    return any(not p.is_floating_point() for p in experts.parameters())


def _runner(model: Any, device: str, max_ram: Any) -> Any:
    if isinstance(model, nn.Module):
        return LoadedModel(model)
    if isinstance(model, str | os.PathLike | Checkpoint):
        return open_model(model, device=device, max_ram=max_ram)
    return model


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; those of a model that streams from disk count as if they were loaded."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _tokens(batch: Mapping[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


class _Meter:
    """Mean power over a stretch of time, from the machine's own energy counters where they can be read."""

    watts: float | None = None

    def __enter__(self) -> _Meter:
        self._begun, self._before = time.perf_counter(), _joules()
        return self

    def __exit__(self, *_: object) -> None:
        after, spent = _joules(), time.perf_counter() - self._begun
        both = [after[name] - energy for name, energy in self._before.items() if name in after]
        if both and min(both) >= 0 and spent > 0:  # a counter that wrapped tells nothing
            self.watts = sum(both) / spent


def _joules(folder: str = _COUNTERS) -> dict[str, float]:
    """Energy used so far by each package that counts it; empty where there is no counter, or no leave to read it."""
    found = {}
    for path in Path(folder).glob("*/energy_uj"):
        if path.parent.name.count(":") == 1:  # whole packages, not their parts
            try:
                found[path.parent.name] = int(path.read_text()) / 1e6
            except (OSError, ValueError):
                continue
    return found
