"""What the commands that plan have in common: a checkpoint, and a profile that is given or made."""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli import _show
from moekit.cli._options import Machine, Observed, Written
from moekit.errors import OptionError, OutputError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.plan import Plan, Receipt
    from moekit.profile import Profile
    from moekit.stream import StreamedModel


SAMPLE = 2048
"""Tokens per layer that a profile keeps for methods that work from samples; otherwise it keeps few."""


def observed(
    checkpoint: "Checkpoint",
    name: str,
    seen: Observed,
    machine: Machine,
    needs: Collection[str] = (),
    then: "Callable[[StreamedModel], int] | None" = None,
) -> "Profile":
    """The profile that `--profile` names, or one made from `--text` that holds what methods need. ``then``: bytes that
    the command takes after it, so that a cap too small for those is refused at once.

    Processes of one `torchrun` profile a share of the documents each. OptionError unless exactly one of both is given.
    """
    if (seen.profile is None) == (not seen.text):
        found = "both are" if seen.text else "neither is"
        raise OptionError(f"give either --profile FILE or --text FILE ({found} given)")
    from moekit.profile import DEFAULT, Profile, read_texts
    from moekit.profile import profile as observe

    if seen.profile is not None:
        loaded = Profile.load(seen.profile)
        loaded.check_source(checkpoint.fingerprint)
        return loaded
    texts = read_texts(seen.text, checkpoint.tokenizer())
    options: dict[str, Any] = {"sample": SAMPLE} if "hidden" in needs else {}
    options["statistics"] = list(dict.fromkeys((*DEFAULT, *sorted(needs))))
    with _show.progress(f"profile {name}") as advance:
        return _together(
            lambda part: observe(
                checkpoint,
                texts,
                max_tokens=seen.max_tokens,
                part=part,
                then=then,
                progress=advance,
                **options,
                **asdict(machine),
            )
        )


def _together(observe: "Callable[[tuple[int, int]], Profile]") -> "Profile":
    """One profile from all processes of a `torchrun`, each of which observes a part; exchanged as files."""
    from moekit.plan import ranks, values
    from moekit.profile import Profile

    spool = values.spool()
    if spool is None or ranks.size() == 1:
        return observe((0, 1))
    spool.folder.mkdir(parents=True, exist_ok=True)
    parts = [spool.folder / f"rank{number}.profile" for number in range(ranks.size())]
    observe((ranks.rank(), ranks.size())).save(parts[ranks.rank()], overwrite=True)
    ranks.wait()
    first, *others = (Profile.load(part) for part in parts)
    for other in others:
        first = first.merge(other)
    return first


@dataclass(frozen=True)
class Planned:
    """A plan, the profile it follows from, and text by domain that neither of them was chosen by."""

    plan: "Plan"
    profile: "Profile | None"
    aside: Any


def planned(
    checkpoint: "Checkpoint",
    name: str,
    methods: list[str],
    seen: Observed,
    machine: Machine,
    task: Path | None = None,
) -> Planned:
    """The plan of methods in sequence; those that search do so with a bar. The profile is read or made only where it
    is asked for. ``task`` is what methods that count wrong answers count them on."""
    if not methods:
        raise OptionError("no method given: name one with --with, such as --with reap:keep=0.5")
    from moekit.cli._choosing import Chooser, check_task
    from moekit.compress import searching, sequence
    from moekit.plan import make_plan, split_held_out

    planners = sequence(methods)
    examples = check_task(planners, task)
    needs = frozenset().union(*(planner.needs for planner in planners))
    profile = observed(checkpoint, name, seen, machine, needs) if seen.profile or seen.text or needs else None
    judge = Chooser(checkpoint, profile, machine, examples)
    with _show.progress(f"search on {name}") as advance, searching(advance):
        plan = make_plan(planners, checkpoint, profile, judge)
    if profile is None:
        return Planned(plan, None, None)
    return Planned(plan, profile, split_held_out(profile.held_out)[1] if judge.read else profile.held_out)


def carried_out(
    checkpoint: "Checkpoint",
    plan: "Plan",
    output: Path,
    text: Any,
    written: Written,
    machine: Machine,
    label: str,
) -> "Receipt":
    """Apply a plan with a bar; measured on `text`, where there is any."""
    from moekit.plan import apply

    with _show.parts(label) as tell:
        return apply(checkpoint, plan, output, text=text or None, progress=tell, **asdict(written), **asdict(machine))


def leads() -> bool:
    """Whether this process writes the outputs; of several only one does, once all have planned."""
    from moekit.plan import ranks

    return ranks.rank() == 0


def held_out(text: list[str], checkpoint: "Checkpoint") -> dict[str, list[str]] | None:
    """Held-out text by domain, None where none was given."""
    from moekit.profile import read_texts

    return read_texts(text, checkpoint.tokenizer()) if text else None


def beside(output: Path) -> Path:
    """Where values computed for an output wait until it is published."""
    return output.with_name(f"{output.name}.values")


def check_output(output: Path, overwrite: bool) -> None:
    """OutputError, before any work, where an output is in the way."""
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another folder or give --overwrite")
