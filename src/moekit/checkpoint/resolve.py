"""From what a user names to a folder: a path, ``moekit:NAME`` (package data), or a hub id in the local cache."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from moekit.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_hub_id(ref: str) -> bool:
    """Whether ``ref`` could name a hub repository: ``name`` or ``owner/name``."""
    return _HUB_ID.fullmatch(ref) is not None and ref.count("/") == 1


def is_local(ref: str) -> bool:
    """Whether ``ref`` is on this machine with its weights."""
    if Path(ref).expanduser().exists():
        return True
    try:
        weight_files(resolve(ref))
    except CheckpointError:
        return False
    return True


def resolve(ref: str | os.PathLike[str]) -> Path:
    """The folder that ``ref`` names. Never uses the network.

    Raises:
        CheckpointError: nothing of that name is on this machine.
    """
    text = os.fspath(ref)
    if text.startswith("moekit:"):
        return _packaged(text.removeprefix("moekit:"))
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{text} is a file; name the folder that holds config.json")
    if is_hub_id(text):
        return _cached(text)
    raise CheckpointError(f"{text} does not exist; name a folder with config.json, a cached hub id or moekit:NAME")


def _packaged(name: str) -> Path:
    data = Path(str(files("moekit") / "data"))
    known = sorted(path.parent.name for path in data.glob("*/config.json"))
    if name not in known:
        found = ", ".join(f"moekit:{n}" for n in known) or "none"
        raise CheckpointError(f"moekit:{name} does not exist; models in this package: {found}")
    return data / name


def _cached(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"{hub_id} is neither a folder nor in the local cache; download it first (hf download {hub_id})"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is missing, unreadable, or something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no model: it has no {path.name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def weight_files(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of a model's weight files, and the index's map from tensor to file (empty without an index)."""
    if (folder / INDEX).exists():
        return index_files(read_json(folder / INDEX), folder / INDEX)
    if (folder / SINGLE).exists():
        return (SINGLE,), {}
    found = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if found:
        return tuple(found), {}
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code; convert them to safetensors first"
        )
    raise CheckpointError(f"{folder} has no weights: no {SINGLE}, no {INDEX}")


def index_files(index: dict[str, Any], path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """As :func:`weight_files`, from an index already read."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} places {name} in {file!r}, which is no file name of its folder")
    return tuple(sorted(set(weight_map.values()))), weight_map
