"""A recipe: an architecture and how it is trained, as a TOML file on top of another one."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.errors import OptionError
from moekit.nn.config import MoekitConfig
from moekit.nn.correction import max_violation
from moekit.nn.flow import gathered
from moekit.nn.layer import finish_step
from moekit.nn.schedule import Moment, Schedule
from moekit.nn.seen import variation
from moekit.nn.tally import Tally
from moekit.train.loop import Record, train
from moekit.train.options import TrainOptions
from moekit.train.sequences import Batch, Batches, targets

if TYPE_CHECKING:
    from moekit.nn.model import MoekitForCausalLM

BASE = "base"
_TABLES = ("model", "train", "schedule", "extends")


@dataclass(frozen=True)
class Recipe:
    """``model``: fields of :class:`MoekitConfig`; ``batch`` rows of ``length`` tokens; ``schedule``: what moves."""

    model: Mapping[str, Any]
    options: TrainOptions
    batch: int = 16
    length: int = 128
    schedule: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, ref: str | Path) -> Recipe:
        """A recipe of the package by its key, or a file.

        ``extends`` names what it stands on ("base" where it names nothing, "" for nothing), a file from the folder of
        the one that names it: tables are merged key by key, everything else is replaced.

        Raises:
            OptionError: there is none of that name, it is no TOML, it stands on itself, or it says what no recipe can.
        """
        return cls.of(_merged(str(ref)), str(ref))

    @classmethod
    def of(cls, told: Mapping[str, Any], name: str = "recipe") -> Recipe:
        """From the tables of a recipe that stands on nothing any more."""
        told = dict(told)
        for table in told:
            if table not in _TABLES:
                raise OptionError(f"{name}: there is no table [{table}] in a recipe; it has {', '.join(_TABLES)}")
        for table in ("model", "train"):
            if not isinstance(told.get(table, {}), Mapping):
                raise OptionError(f"{name}: {table}={told[table]!r} must be a table: write [{table}] above its options")
        known = {f.name for f in fields(TrainOptions)} | {"batch", "length"}
        training = dict(told.get("train", {}))
        for option in training:
            if option not in known:
                raise OptionError(f"{name}: [train] has no option {option!r}; it has {', '.join(sorted(known))}")
        sizes = {option: training.pop(option) for option in ("batch", "length") if option in training}
        for option, value in sizes.items():
            least = 2 if option == "length" else 1
            if type(value) is not int or value < least:
                raise OptionError(f"{name}: {option}={value!r} in [train] must be a whole number from {least} on")
        return cls(dict(told.get("model", {})), TrainOptions(**training), schedule=_schedule(told, name), **sizes)

    def config(self) -> MoekitConfig:
        """The model's configuration.

        Raises:
            OptionError: a field that no model has, or of a wrong type.
        """
        known = {f.name for f in fields(MoekitConfig)}
        for name in self.model:
            if name not in known:
                raise OptionError(f"[model] has no field {name!r}: see moekit.nn.MoekitConfig")
        try:
            return MoekitConfig(**self.model)
        except OptionError:
            raise
        except Exception as error:  # what a strict dataclass raises has many lines
            raise OptionError(f"[model] is no valid configuration: {' '.join(str(error).split())[:300]}") from None

    def build(self, seed: int | None = None) -> MoekitForCausalLM:
        """The untrained model in float32, its weights drawn from ``seed`` (the training seed if None)."""
        from moekit.nn.model import MoekitForCausalLM

        torch.manual_seed(self.options.seed if seed is None else seed)
        return MoekitForCausalLM(self.config())

    def with_options(self, **changes: Any) -> Recipe:
        """The same with other training options."""
        return replace(self, options=replace(self.options, **changes))

    def with_model(self, **changes: Any) -> Recipe:
        """The same with other fields of the model; tables are merged as a recipe that extends this one would."""
        return replace(self, model=_over(self.model, changes))


def _schedule(told: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    entries = told.get("schedule", [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise OptionError(f"{name}: schedule must be a list of tables: write [[schedule]] above each")
    for entry in entries:
        if set(entry) != {"set", "course"}:
            raise OptionError(f"{name}: a [[schedule]] says what to set and its course, this one has {sorted(entry)}")
        if not isinstance(entry["set"], str) or not isinstance(entry["course"], str | Mapping):
            raise OptionError(f"{name}: a [[schedule]] sets the name of an attribute, by a course's name or table")
    return tuple(entries)


def recipes() -> list[str]:
    """The keys of the recipes that come with the package."""
    found = (path.name for path in files("moekit.recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def _merged(ref: str, beside: Path = Path(), above: tuple[str, ...] = ()) -> dict[str, Any]:
    packaged = files("moekit.recipes") / f"{ref}.toml"
    source = packaged if packaged.is_file() else beside / ref
    if not source.is_file():
        raise OptionError(f"there is no recipe {ref!r}: name a TOML file, or one of {', '.join(recipes())}")
    if str(source) in above:
        raise OptionError(f"{above[0]} stands on itself: {' extends '.join((*above, str(source)))}")
    try:
        own = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{ref} is no recipe: {error}") from None
    under = own.pop("extends", "" if ref == BASE else BASE)
    if not isinstance(under, str):
        raise OptionError(f"{ref}: extends={under!r} must be the name of a recipe or of a file")
    return _over(_merged(under, Path(str(source)).parent, (*above, str(source))), own) if under else own


def _over(under: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if both and "kind" not in value else value
    return merged


@dataclass
class Training:
    """A recipe being carried out on one model. ``load`` [layers, E] counts assignments of the step that ended last."""

    model: Any
    recipe: Recipe
    load: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedules = [Schedule(self.model, entry["set"], entry["course"]) for entry in self.recipe.schedule]
        self.begun = False

    def moment(self, step: int) -> Moment:
        return Moment(step, self.recipe.options.steps, self.recipe.options.seed)

    def begin_step(self, step: int) -> None:
        """Move what schedules move; a run taken up again is first brought to the step before (some act on a change)."""
        for at in [step] if self.begun or step == 0 else [step - 1, step]:
            for schedule in self.schedules:
                schedule.apply(self.moment(at))
        self.begun = True

    def end_step(self, step: int) -> None:
        self.load = [gathered(part.count_E).clone() for part in self.model.modules() if isinstance(part, Tally)]
        finish_step(self.model)

    def unevenness(self) -> dict[str, float]:
        """Of the last step's load: coefficient of variation, mean over layers, and experts of all layers that no token
        chose."""
        each = [float(variation(count_E.float()).sqrt()) for count_E in self.load]
        dead = sum(int((count_E == 0).sum()) for count_E in self.load)
        return {"variation": sum(each) / max(1, len(each)), "dead": dead}

    def end(self) -> None:
        """Training is over: every value is what its course ends with, and what was drawn goes back."""
        needs = [(p, p.requires_grad) for p in self.model.parameters()]
        self.begin_step(self.recipe.options.steps)
        for schedule in self.schedules:
            schedule.end()
        for parameter, need in needs:
            parameter.requires_grad_(need)

    def left(self) -> dict[str, tuple[Any, Any]]:
        """What schedules have moved: by what they set, the value now and the one that the model was built with."""
        found = {}
        for entry, schedule in zip(self.recipe.schedule, self.schedules, strict=True):
            for module, before in zip(schedule.modules, schedule.before, strict=True):
                if (now := getattr(module, schedule.attribute, True)) != before:
                    found[entry["set"]] = now, before
        return found

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross-entropy in nats per token, plus the balance terms; its parts for the record.

        Of several processes each gives its tokens' share of the mean over all, so that the mean of their gradients is
        that of one process on the whole batch; batches that are accumulated count alike, however long their rows are.
        """
        out = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
        wanted, weight = targets(batch)
        logits = out.logits[:, :-1].flatten(0, 1).float()
        losses = torch.nn.functional.cross_entropy(logits, wanted.reshape(-1), reduction="none")
        entropy = (losses * weight.reshape(-1)).sum() / _mean_over_ranks(weight.sum()).clamp(min=1)
        violation = torch.tensor([max_violation(gathered(count)) for count in out.expert_load or ()] or [0.0]).mean()
        parts = {"cross_entropy": entropy, **out.losses, "max_violation": violation}
        return entropy + sum(out.losses.values()), parts


def _mean_over_ranks(value: Tensor) -> Tensor:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return gathered(value) / torch.distributed.get_world_size() if several else value


def carry_out(
    recipe: Recipe,
    batches: Batches,
    model: Any = None,
    *,
    folder: str | Path | None = None,
    after_step: Callable[[int, Record, Training], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, Record]:
    """Train the recipe's model (or the one given) on ``batches``; with a folder the run can be taken up again.

    Raises:
        OptionError: the recipe does not fit together, accelerate is missing, or the folder holds another run.
    """
    model = recipe.build() if model is None else model
    running = Training(model, recipe)

    def ended(step: int) -> None:
        running.end_step(step)
        if after_step is not None:
            after_step(step, record, running)

    record = Record()
    train(
        model,
        running.loss,
        batches,
        recipe.options,
        folder=folder,
        record=record,
        before_step=running.begin_step,
        after_step=ended,
        progress=progress,
    )
    running.end()
    return model, record
