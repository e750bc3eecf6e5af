"""Owner and devices as processes. One is started and imports everything once; the others are forked from it when they
are wanted, and so are ready at once. All end when whoever asked for them is gone."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from typing import Any

import torch

from moekit.kernels import warm_up
from moekit.run._scaling_device import Device
from moekit.run._scaling_owner import Owner
from moekit.run._scaling_wire import Channel, ScalingError


def serve_owner(channel: Channel) -> None:
    owner = Owner()
    while True:
        message, _, _ = channel.receive()
        try:
            reply = getattr(owner, message["do"])(message)
            channel.send(reply, fds=[owner.frames[message["of"]].fd] if message["do"] == "table" else ())
        except ScalingError:
            raise
        except Exception as error:  # whatever it is, whoever asked must hear of it, and the experts stay
            channel.send({"error": f"{type(error).__name__}: {error}"})


def serve_device(channel: Channel) -> None:
    device = Device()
    while True:
        message, data, fds = channel.receive()
        try:
            out = _done(device, message, data, fds)
            channel.send({}, out.contiguous().view(torch.uint8).numpy() if out is not None else b"")
        except ScalingError:
            raise
        except Exception as error:
            channel.send({"error": f"{type(error).__name__}: {error}"})
        finally:
            for fd in fds:
                os.close(fd)


def _done(device: Device, message: dict[str, Any], data: bytearray, fds: list[int]) -> torch.Tensor | None:
    if message["do"] == "run":
        return device.run(message, data)
    if message["do"] == "attach":
        device.attach(message, fds[0])
    else:
        device.release(message)
    return None


ROLES = {"owner": serve_owner, "device": serve_device}


def nursery(control: Channel) -> None:
    """Fork a process for every message: its ``role``, and the socket it is to serve."""
    while True:
        message, _, fds = control.receive()
        child = os.fork()
        if not child:
            control.close()
            _live(message["role"], fds[0])
        os.close(fds[0])
        control.send({"process": child})


def _live(role: str, fd: int) -> None:
    torch.set_num_threads(1)  # torch remakes its pool after a fork; two threads that ask at once may get none
    try:
        with contextlib.suppress(ScalingError):
            ROLES[role](Channel(socket.socket(fileno=fd), seconds=None))
    except BaseException:
        traceback.print_exc()  # a fault of ours: whoever asks will hear only that the process has ended
    finally:
        os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warm_up(torch.float32)
    with contextlib.suppress(ScalingError):  # whoever asked is gone
        nursery(Channel(socket.socket(fileno=int(sys.argv[1])), seconds=None))
    os._exit(0)  # nothing is to be tidied up, and taking down what was imported takes long
