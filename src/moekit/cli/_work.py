"""What the commands that plan have in common: a checkpoint, and a profile that is given or made."""

from pathlib import Path
from typing import TYPE_CHECKING

from moekit.cli import _show
from moekit.errors import OptionError, OutputError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.profile import Profile


def observed(
    checkpoint: "Checkpoint",
    name: str,
    profile: Path | None,
    text: list[str],
    *,
    max_tokens: int | None = None,
    max_ram: str | None = None,
    device: str = "auto",
) -> "Profile":
    """The profile that `--profile` names, or one made from `--text`. OptionError unless exactly one is given."""
    if (profile is None) == (not text):
        found = "both are" if text else "neither is"
        raise OptionError(f"give either --profile FILE or --text FILE ({found} given)")
    from moekit.profile import Profile, read_texts
    from moekit.profile import profile as observe

    if profile is not None:
        loaded = Profile.load(profile)
        loaded.check_source(checkpoint.fingerprint)
        return loaded
    texts = read_texts(text, checkpoint.tokenizer())
    with _show.progress(f"profile {name}") as advance:
        return observe(checkpoint, texts, max_tokens=max_tokens, max_ram=max_ram, device=device, progress=advance)


def held_out(text: list[str], checkpoint: "Checkpoint") -> dict[str, list[str]] | None:
    """Held-out text by domain, None where none was given."""
    from moekit.profile import read_texts

    return read_texts(text, checkpoint.tokenizer()) if text else None


def check_output(output: Path, overwrite: bool) -> None:
    """OutputError, before any work, where an output is in the way."""
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: choose another folder or give --overwrite")
