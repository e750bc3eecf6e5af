"""What the commands that plan have in common: a checkpoint, and a profile that is given or made."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli import _show
from moekit.cli._options import Machine, Observed, Written
from moekit.errors import OptionError, OutputError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.plan import Plan, Receipt
    from moekit.profile import Profile


def observed(checkpoint: "Checkpoint", name: str, seen: Observed, machine: Machine) -> "Profile":
    """The profile that `--profile` names, or one made from `--text`. OptionError unless exactly one is given."""
    if (seen.profile is None) == (not seen.text):
        found = "both are" if seen.text else "neither is"
        raise OptionError(f"give either --profile FILE or --text FILE ({found} given)")
    from moekit.profile import Profile, read_texts
    from moekit.profile import profile as observe

    if seen.profile is not None:
        loaded = Profile.load(seen.profile)
        loaded.check_source(checkpoint.fingerprint)
        return loaded
    texts = read_texts(seen.text, checkpoint.tokenizer())
    with _show.progress(f"profile {name}") as advance:
        return observe(checkpoint, texts, max_tokens=seen.max_tokens, progress=advance, **asdict(machine))


def planned(
    checkpoint: "Checkpoint", name: str, methods: list[str], seen: Observed, machine: Machine
) -> tuple["Plan", "Profile | None"]:
    """The plan of methods in sequence, and the profile, which is read or made only where it is asked for."""
    if not methods:
        raise OptionError("no method given: name one with --with, such as --with reap:keep=0.5")
    from moekit.compress import sequence
    from moekit.plan import make_plan

    planners = sequence(methods)
    needed = seen.profile is not None or seen.text or any(planner.needs for planner in planners)
    profile = observed(checkpoint, name, seen, machine) if needed else None
    return make_plan(planners, checkpoint, profile), profile


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


def held_out(text: list[str], checkpoint: "Checkpoint") -> dict[str, list[str]] | None:
    """Held-out text by domain, None where none was given."""
    from moekit.profile import read_texts

    return read_texts(text, checkpoint.tokenizer()) if text else None


def check_output(output: Path, overwrite: bool) -> None:
    """OutputError, before any work, where an output is in the way."""
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another folder or give --overwrite")
