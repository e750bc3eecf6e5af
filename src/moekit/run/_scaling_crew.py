"""The processes of an elastic service, as seen by the one that started them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moekit.run._scaling_wire import Channel, ScalingError, pair


class Crew:
    """``owner`` and ``devices`` by number, started when first asked for. Raises :class:`ScalingError`."""

    def __init__(self) -> None:
        self.devices: dict[int, Channel] = {}
        self._wire = threading.Lock()
        self._nursery, theirs = pair("the process that starts others")
        command = [sys.executable, "-m", "moekit.run._scaling_process", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.owner = self._nursery
        try:
            self.owner = self._born("owner", "the owner of the experts")
        except ScalingError:
            self.close()
            raise

    def tell(self, device: int, order: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Have a device do something; its process is started if there is none."""
        if device not in self.devices:
            self.devices[device] = self._born("device", f"device {device}")
        with self._wire:
            self.devices[device].ask(order, fds=fds)

    def compute(self, orders: Mapping[int, tuple[dict[str, Any], Sequence[Any]]]) -> dict[int, bytearray]:
        """What each device answers to its order (head, buffers), all at work at the same time.

        Every answer that comes is read before an error is raised: the next order must not find it.
        """
        sent, answers = [], {}
        failed: ScalingError | None = None
        with self._wire:
            for device, (head, buffers) in orders.items():
                try:
                    self.devices[device].send(head, *buffers)
                    sent.append(device)
                except ScalingError as error:
                    failed = failed or error
            for device in sent:
                try:
                    answers[device] = self.devices[device].answer()[1]
                except ScalingError as error:
                    failed = failed or error
        if failed is not None:
            raise failed
        return answers

    def dismiss(self, numbers: Collection[int]) -> None:
        """End these devices' processes."""
        with self._wire:
            for number in numbers:
                self.devices.pop(number).close()

    def close(self) -> None:
        """End all processes; they do so by themselves once nobody is at the other end."""
        self.dismiss(list(self.devices))
        self._nursery.close()
        self.owner.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _born(self, role: str, who: str) -> Channel:
        ours, theirs = pair(who)
        try:
            self._nursery.ask({"role": role}, fds=[theirs.fileno()])
        finally:
            theirs.close()
        return ours
