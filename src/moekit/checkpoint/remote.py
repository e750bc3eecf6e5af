"""Headers of a model on the hub, without its weights: config and safetensors headers by HTTP range requests.

The endpoint is ``HF_ENDPOINT`` (default https://huggingface.co); a token in ``HF_TOKEN`` is sent to it alone.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from torch import Tensor

from moekit.checkpoint.headers import TensorInfo, parse_header
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.resolve import INDEX, SINGLE, index_files, is_hub_id
from moekit.errors import CheckpointError

TIMEOUT = 30.0
"""Seconds to wait for the server."""
FIRST = 1 << 16
"""Bytes of a file fetched at first: most headers fit."""


class HeadersOnly(Reader):
    """Stands in for the weights of a model that is not on this machine."""

    def __init__(self, hub_id: str, infos: Mapping[str, TensorInfo]) -> None:
        super().__init__(Path(hub_id), infos)
        self._hub_id = hub_id

    def _elements(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        raise CheckpointError(
            f"{self._hub_id} is known by its headers only, {info.name} cannot be read; download it first "
            f"(hf download {self._hub_id})"
        )


def fetch_headers(
    hub_id: str, revision: str = "main"
) -> tuple[dict[str, Any], dict[str, dict[str, TensorInfo]], dict[str, str]]:
    """(config, headers by file, index) of a hub repository.

    Raises:
        CheckpointError: not a hub id, not reachable, no such model, or no safetensors.
    """
    if not is_hub_id(hub_id):
        raise CheckpointError(f"{hub_id} is no hub id; expected owner/name")
    base = f"{_endpoint()}/{quote(hub_id)}/resolve/{quote(revision, safe='')}"
    config = _json(_get(f"{base}/config.json", hub_id), hub_id, "config.json")
    index_text = _get(f"{base}/{INDEX}", hub_id, absent_is_fine=True)
    files: tuple[str, ...] = (SINGLE,)
    index: dict[str, str] = {}
    if index_text is not None:
        files, index = index_files(_json(index_text, hub_id, INDEX), Path(hub_id) / INDEX)
    try:
        return config, {file: _header(f"{base}/{quote(file)}", hub_id, file) for file in files}, index
    except _AbsentError:
        raise CheckpointError(f"{hub_id} on {_endpoint()} has no safetensors weights, or not all of them") from None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _header(url: str, hub_id: str, file: str) -> dict[str, TensorInfo]:
    body, size = _range(url, hub_id, file, 0, FIRST)

    def fetch(start: int, count: int) -> bytes:
        if start + count <= len(body):
            return body[start : start + count]
        return _range(url, hub_id, file, start, count)[0]

    return parse_header(fetch, size, file)


def _range(url: str, hub_id: str, file: str, start: int, count: int) -> tuple[bytes, int]:
    """Bytes of a remote file, and its whole size."""
    request = _request(url, {"Range": f"bytes={start}-{start + count - 1}"})
    with _open(request, hub_id) as response:
        if response.status == 206:
            return response.read(), int(response.headers["Content-Range"].rpartition("/")[2])
    raise CheckpointError(f"{hub_id}: the server sends {file} whole or not at all; headers need range requests")


def _get(url: str, hub_id: str, *, absent_is_fine: bool = False) -> bytes | None:
    try:
        with _open(_request(url, {}), hub_id) as response:
            return response.read()
    except _AbsentError:
        if absent_is_fine:
            return None
        raise CheckpointError(f"{hub_id} is no model on {_endpoint()}, or needs a token (HF_TOKEN)") from None


class _AbsentError(CheckpointError):
    pass


class _SameHostOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never takes the token to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


def _request(url: str, headers: Mapping[str, str]) -> urllib.request.Request:
    token = os.environ.get("HF_TOKEN")
    return urllib.request.Request(url, headers={**headers, **({"Authorization": f"Bearer {token}"} if token else {})})


def _open(request: urllib.request.Request, hub_id: str) -> Any:
    if urlsplit(request.full_url).scheme not in ("http", "https"):
        raise CheckpointError(f"HF_ENDPOINT is {_endpoint()!r}, expected an http(s) address")
    try:
        return urllib.request.build_opener(_SameHostOnly).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise _AbsentError(f"{hub_id}: {request.full_url} answered {error.code}") from None
        raise CheckpointError(f"{hub_id}: {_endpoint()} answered {error.code} {error.reason}") from None
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise CheckpointError(
            f"{hub_id} is not on this machine and {_endpoint()} cannot be reached: {reason}"
        ) from None


def _json(text: bytes | None, hub_id: str, file: str) -> dict[str, Any]:
    try:
        value = json.loads(text or b"")
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise CheckpointError(f"{hub_id}: its {file} is not a JSON object")
