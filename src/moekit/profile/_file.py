"""The profile file: safetensors with one JSON header in its metadata, as ``docs/profile-format.md`` describes it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from moekit.errors import OutputError, ProfileError
from moekit.profile.layer import LayerProfile
from moekit.profile.schema import FIELDS

if TYPE_CHECKING:
    from moekit.profile.document import Profile

FORMAT, VERSION = "moekit-profile", 2
_KEY = "moekit"
_DTYPES = {"<f8": "F64", "<f4": "F32", "<i8": "I64", "<i4": "I32", "<u8": "U64"}


def _arrays(profile: Profile) -> dict[str, np.ndarray]:
    found = {
        f"layers/{name}/{key}": array for name, layer in profile.layers.items() for key, array in layer.arrays.items()
    }
    found |= {f"trace/{key}": array for key, array in profile.trace.arrays.items()}
    for index, domain in enumerate(profile.domains):
        pieces = [np.asarray(ids) for ids in profile.held_out.get(domain, ())]
        if pieces:
            found[f"held_out/{index}/ids"] = np.concatenate(pieces).astype(np.int32)
            found[f"held_out/{index}/ends"] = np.cumsum([len(ids) for ids in pieces]).astype(np.int64)
    return {name: np.ascontiguousarray(found[name]) for name in sorted(found)}


def _header(profile: Profile, arrays: Mapping[str, np.ndarray]) -> str:
    layers = [
        {"name": layer.name, "layer": layer.layer, "num_experts": layer.num_experts, "top_k": layer.top_k}
        for layer in profile.layers.values()
    ]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "source": profile.source,
        "model": profile.model,
        "domains": list(profile.domains),
        "layers": layers,
        "options": dict(profile.options),
        "digest": _digest(arrays),
    }
    return json.dumps(header, sort_keys=True, ensure_ascii=True)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every array, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(_raw(array))
    return digest.hexdigest()


def _raw(array: np.ndarray) -> memoryview:
    """The array's bytes where they lie."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _chunks(arrays: Mapping[str, np.ndarray], header: str) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece: the library would copy every array first, and samples are large.

    Widest dtype first, then by name, so that each array is aligned.
    """
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    table: dict[str, Any] = {"__metadata__": {_KEY: header}}
    offset = 0
    for name in ordered:
        array = arrays[name]
        span = [offset, offset + array.nbytes]
        table[name] = {"dtype": _DTYPES[array.dtype.str], "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield from (_raw(arrays[name]) for name in ordered)


def fingerprint(profile: Profile) -> str:
    return hashlib.sha256(_header(profile, _arrays(profile)).encode()).hexdigest()


def save(profile: Profile, path: str | PathLike[str], overwrite: bool) -> None:
    target = Path(path)
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already: name another file, or pass --overwrite")
    arrays = _arrays(profile)
    write_whole(target, _chunks(arrays, _header(profile, arrays)))


def write_whole(target: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """All of the file or none of it. Raises OutputError where it cannot be written."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}-", delete=False) as file:
            temporary = Path(file.name)
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{target} cannot be written: {error.strerror}") from None


def load(path: str | PathLike[str]) -> Profile:
    from moekit.profile.document import Profile, Tokens

    where = Path(path)
    header, arrays = _read(where)
    if header.get("digest") != _digest(arrays):
        raise ProfileError(f"{where} is corrupt: its data do not match its own digest; profile again")
    try:
        domains = tuple(header["domains"])
        layers = {entry["name"]: _layer(entry, domains, arrays) for entry in header["layers"]}
        return Profile(
            source=header["source"],
            model=header["model"],
            domains=domains,
            layers=layers,
            held_out={domain: list(_held_out(arrays, index)) for index, domain in enumerate(domains)},
            options=header["options"],
            trace=Tokens(_group(arrays, "trace/")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"{where} is corrupt: {type(error).__name__} at {error}; profile again") from None


def _read(where: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import safe_open

    if not where.is_file():
        raise ProfileError(f"{where} is no profile: there is no such file; make one with 'moekit profile'")
    try:
        with safe_open(where, framework="numpy") as file:
            raw = (file.metadata() or {}).get(_KEY)
            header = json.loads(raw) if raw else None
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ProfileError(
                    f"{where} is no profile: it is another safetensors file; make one with 'moekit profile'"
                )
            if header.get("version") != VERSION:
                raise ProfileError(
                    f"{where} has profile version {header.get('version')}, this moekit reads {VERSION}: profile again"
                )
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ProfileError(
            f"{where} is no readable profile ({reason}): it is cut short or another kind of file"
        ) from None


def _layer(entry: dict[str, Any], domains: tuple[str, ...], arrays: Mapping[str, np.ndarray]) -> LayerProfile:
    own = _group(arrays, f"layers/{entry['name']}/")
    for name, array in own.items():
        if name not in FIELDS or array.ndim != len(FIELDS[name].axes):
            raise ValueError(f"layers/{entry['name']}/{name}")
    return LayerProfile(entry["name"], entry["layer"], entry["num_experts"], entry["top_k"], domains, own)


def _held_out(arrays: Mapping[str, np.ndarray], index: int) -> Iterator[np.ndarray]:
    ids, ends = arrays.get(f"held_out/{index}/ids"), arrays.get(f"held_out/{index}/ends")
    if ids is not None and ends is not None:
        yield from np.split(ids.astype(np.int64), ends[:-1])


def _group(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
