"""Messages between processes of one machine: a JSON head, raw bytes, and open files, over a Unix socket."""

from __future__ import annotations

import array
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

from moekit.errors import MoekitError

_PREFIX = struct.Struct("<IQ")
SECONDS = 300.0
"""After which a silent process is taken for dead."""


class ScalingError(MoekitError):
    """A process of an elastic service failed, ended, or did not answer."""


class Channel:
    """One end of a socket. ``who`` is at the other end, for error messages; ``seconds`` None waits for ever."""

    def __init__(self, end: socket.socket, who: str = "the service", seconds: float | None = SECONDS) -> None:
        self._end, self.who = end, who
        end.settimeout(seconds)

    def send(self, head: dict[str, Any], *data: Any, fds: Sequence[int] = ()) -> None:
        """``data`` are buffers of bytes, sent end to end; ``fds`` open files, which stay open here."""
        text, parts = json.dumps(head).encode(), [memoryview(one).cast("B") for one in data]
        prefix = _PREFIX.pack(len(text), sum(map(len, parts)))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._end.sendmsg([prefix], rights)
            buffers: list[bytes | memoryview] = [prefix[sent:], text, *parts]
            for part in buffers:
                self._end.sendall(part)
        except OSError as error:
            raise self._lost(error) from None

    def receive(self) -> tuple[dict[str, Any], bytearray, list[int]]:
        """The next message: head, bytes, open files. Raises :class:`ScalingError` at the end, or after a silence."""
        try:
            first, fds, _, _ = socket.recv_fds(self._end, _PREFIX.size, 4)
            if not first:
                raise ConnectionError("it has ended")
            text, size = _PREFIX.unpack(first + self._exactly(_PREFIX.size - len(first)))
            return json.loads(self._exactly(text)), self._exactly(size), fds
        except OSError as error:
            raise self._lost(error) from None

    def ask(
        self, head: dict[str, Any], *data: Any, fds: Sequence[int] = ()
    ) -> tuple[dict[str, Any], bytearray, list[int]]:
        """Send, and return the answer. Raises :class:`ScalingError`, also for an error that the other end reports."""
        self.send(head, *data, fds=fds)
        return self.answer()

    def answer(self) -> tuple[dict[str, Any], bytearray, list[int]]:
        """Receive, where an error that the other end reports is raised here."""
        found = self.receive()
        if "error" in found[0]:
            raise ScalingError(f"{self.who} failed: {found[0]['error']}")
        return found

    def close(self) -> None:
        self._end.close()

    def _exactly(self, size: int) -> bytearray:
        found = bytearray(size)
        view, done = memoryview(found), 0
        while done < size:
            count = self._end.recv_into(view[done:])
            if not count:
                raise ConnectionError("it has ended")
            done += count
        return found

    def _lost(self, error: OSError) -> ScalingError:
        what = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
        return ScalingError(f"lost {self.who}: {what}; open the service anew")


def pair(who: str, seconds: float | None = SECONDS) -> tuple[Channel, socket.socket]:
    """Our end, and the other one for process ``who``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours, who, seconds), theirs
