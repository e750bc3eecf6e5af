"""`moekit serve`: the same model for OpenAI-compatible clients."""

import sys
from typing import Annotated

import typer

from moekit.cli._options import Device, Model
from moekit.cli.run import Ahead, DeviceMemory, Memory, Policy, Read, StandIn, placed_on, stand_ins_of
from moekit.errors import OptionError


def serve(
    model: Model,
    memory: Memory = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any free one.")] = 8000,
    context: Annotated[
        int, typer.Option("--context", metavar="N", min=2, help="Tokens of prompt and answer together, at most.")
    ] = 4096,
    waiting: Annotated[
        int, typer.Option("--waiting", metavar="N", min=0, help="Requests that may wait; more are refused (429).")
    ] = 16,
    policy: Policy = None,
    ahead: Ahead = None,
    device: Device = "cpu",
    device_memory: DeviceMemory = None,
    stand_in: StandIn = None,
    read: Read = None,
) -> None:
    """Answer OpenAI-compatible clients (completions and chat, streamed or whole) under a cap on memory.

    One answer at a time, for one machine's own clients; to serve many users at once, export the model to an engine
    made for that. On SIGTERM or Ctrl-C what is in line is answered first.

    \b
    Examples:
      moekit serve ./Qwen3-30B-A3B --memory 8GB --port 8080
      curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    try:
        import uvicorn

        from moekit.run.server import app
    except ImportError:
        raise OptionError("serving needs starlette and uvicorn: pip install 'moekit[serve]'") from None
    from moekit.checkpoint import Checkpoint
    from moekit.run import load
    from moekit.run.desk import Desk

    copies, placed = stand_ins_of(stand_in, read), placed_on(device, device_memory)
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.tokenizer()
    opened = load(checkpoint, memory, context=context, policy=policy, ahead=ahead, **placed, **copies)
    desk = Desk(opened, tokenizer, waiting)
    if copies:
        sys.stderr.write("moekit: stand-ins are used for missing experts, so answers are not the exact model's\n")
    sys.stderr.write(f"moekit: serving {model} on http://{host}:{port}/v1\n")
    uvicorn.run(app(desk, model), host=host, port=port, log_level="warning")
