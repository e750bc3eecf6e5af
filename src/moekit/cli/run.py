"""`moekit run`: text from a model that is larger than the memory it gets."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._options import Device, Json, Model
from moekit.errors import OptionError

if TYPE_CHECKING:
    from moekit.run._predictors_patterns import Retrieval
    from moekit.run._stand_in import Divergence, StandIns
    from moekit.run.answer import Cost
    from moekit.run.store import Counters

MEMORY_HELP = "Cap on this process's peak memory, such as 4GB (10^9 bytes). Default: all experts in memory."
Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help=MEMORY_HELP)]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="POLICY[:KEY=VALUE,...]",
        help="Which experts make room: lru, arc, lfu:pinned=FILE ... Default: what `tune` found, else by what fits.",
    ),
]
Ahead = Annotated[
    int | None,
    typer.Option("--ahead", metavar="N", min=0, help="Experts of the next layer to read while one computes."),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory", metavar="SIZE", help="With --device cuda: cap on what tensors take there. Default: all free."
    ),
]
StandIn = Annotated[
    str | None,
    typer.Option(
        "--stand-in",
        metavar="DIR",
        help="The same model packed in fewer bits (rtn:bits=4), used for missing experts: no longer exact.",
    ),
]
Read = Annotated[
    str | None,
    typer.Option("--read", metavar="RULE", help="When a stand-in is used: hobbit[:high=0.6,low=0.9]. Default: hobbit."),
]


def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to go on from; - reads standard input.")],
    memory: Memory = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", min=1, help="At most so many.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", min=0, help="0: the likeliest token.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of drawing tokens.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is the user's turn of the chat template.")] = False,
    policy: Policy = None,
    ahead: Ahead = None,
    device: Device = "cpu",
    device_memory: DeviceMemory = None,
    stand_in: StandIn = None,
    read: Read = None,
    patterns: Annotated[
        Path | None,
        typer.Option(
            "--patterns", metavar="FILE", help="Of `moekit patterns`: the experts of the prompt's task stay in memory."
        ),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say afterwards what it took, and the bounds.")] = False,
    as_json: Json = False,
) -> None:
    """Generate from a fraction of the memory a model needs: experts are read from its own files as they are used.

    The tokens are those of the whole model in memory, whatever the cap; with --stand-in they are not, and what they
    diverge by is measured with --explain.

    \b
    Examples:
      moekit run moekit:mini "def add(a, b):" --memory 700MB --explain
      moekit run ./Qwen3-30B-A3B "Why is the sky blue?" --chat --memory 8GB
      moekit run ./model "Why is the sky blue?" --memory 8GB --stand-in ./model-4bit --explain
    """
    from moekit.checkpoint import Checkpoint
    from moekit.run.answer import answer, prompt_ids
    from moekit.run.paging import load, paging

    copies, placed = stand_ins_of(stand_in, read), placed_on(device, device_memory)
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.tokenizer()
    ids = prompt_ids(tokenizer, sys.stdin.read() if prompt == "-" else prompt, chat)
    context = ids.shape[1] + new_tokens
    opened = load(checkpoint, memory, context=context, policy=policy, ahead=ahead, **placed, **copies)
    retrieval = None if patterns is None else _kept(opened, checkpoint.fingerprint, patterns)
    made, cost = answer(
        opened, ids, new_tokens, tokenizer=tokenizer, say=None if as_json else _say, temperature=temperature, seed=seed
    )
    used = paging(opened).stand_ins
    apart = _divergence(opened, used, ids, made) if explain and used is not None else None
    if as_json:
        text = str(tokenizer.decode(made, skip_special_tokens=True))
        _show.emit(
            {
                "text": text,
                "exact": used is None,
                "task": retrieval and retrieval.task,
                **_figures(used, apart),
                **cost.as_dict(),
            }
        )
        return
    _say("\n")
    lines = explained(cost) if explain else []
    lines += [("task", str(retrieval.task))] if retrieval is not None and explain else []
    lines += [("not exact", _inexact(used, apart))] if used is not None else []
    sys.stderr.write("".join(f"{name:<22}{value}\n" for name, value in lines))


def _kept(opened: Any, fingerprint: str, path: Path) -> "Retrieval":
    from moekit.compress.premoe import Patterns
    from moekit.run._predictors_patterns import keep_patterns

    found = Patterns.load(path)
    found.check_source(fingerprint)
    return keep_patterns(opened, found.keys, {task: found.ordered(task) for task in found.tasks})


def stand_ins_of(stand_in: str | None, read: str | None) -> dict[str, Any]:
    """The arguments of ``moekit.load`` that the options say. OptionError for a rule without stand-ins."""
    if stand_in is None:
        if read is not None:
            raise OptionError("--read says when stand-ins are used: give them with --stand-in DIR")
        return {}
    from moekit.run.rules import rule

    return {"stand_in": stand_in, "read": rule(read or "hobbit")}


def placed_on(device: str, device_memory: str | None) -> dict[str, Any]:
    """The arguments of ``moekit.load`` that the options say. OptionError for a cap on no device."""
    if device == "cpu" and device_memory is not None:
        raise OptionError("--device-memory caps what a device holds: name it with --device cuda")
    return {"device": device, "device_memory": device_memory}


def _divergence(model: Any, used: "StandIns", ids: Any, made: Any) -> "Divergence":
    import torch

    from moekit.run._stand_in import divergence

    counted = dict(used.uses)  # measuring goes over the text once more
    found = divergence(model, used, torch.cat([ids, made[None]], 1), ids.shape[1])
    used.uses.update(counted)
    return found


def _figures(used: "StandIns | None", apart: "Divergence | None") -> dict[str, Any]:
    if used is None:
        return {}
    return {"uses": _uses(used), "divergence": None if apart is None else asdict(apart)}


def _uses(used: "StandIns") -> dict[str, int]:
    """Experts of batches by what became of them."""
    there, as_is, packed, left_out = used.uses.values()
    return {"in memory": there, "read as they are": as_is, "read as copies": packed, "left out": left_out}


def _inexact(used: "StandIns", apart: "Divergence | None") -> str:
    """What stand-ins were used for, and what they changed."""
    said = ", ".join(f"{count} {what}" for what, count in _uses(used).items())
    if apart is None:
        return f"experts: {said}; --explain measures what that changes"
    return (
        f"experts: {said}; {apart.kl:.3g} nats a token from the exact model, which takes the same likeliest token for "
        f"{apart.agree:.1%} of {apart.tokens}"
    )


def _say(text: str) -> None:
    """Text on standard output at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def explained(cost: "Cost") -> list[tuple[str, str]]:
    """What an answer took, a line each."""
    counters, gigabytes = cost.counters, _show.gigabytes
    share = f", {counters.hit_rate / cost.bound:.2f} of Belady's {cost.bound:.3f}" if cost.bound else ""
    tokens = cost.prompt_tokens + cost.new_tokens - 1
    source = "disk" if cost.disk is None else "memory"
    lines = [
        ("prompt", f"{cost.prompt_tokens} tokens, first new one after {cost.first:.2f} s"),
        ("speed", f"{cost.tokens_per_second:.2f} tokens/s for the {cost.new_tokens - 1} after it"),
        ("experts in memory", f"{cost.experts} of {cost.all_experts}"),
        ("hit rate", f"{counters.hit_rate:.3f}{share}"),
        (f"read from {source}", _rate(counters, tokens)),
        ("read ahead in vain", gigabytes(counters.useless_bytes)),
        ("stalled", f"{counters.stall_seconds:.2f} s, {1000 * counters.stall_seconds / tokens:.1f} ms a token"),
        ("peak memory", gigabytes(cost.peak)),
    ]
    return lines if cost.disk is None else [*lines, ("read from disk", _rate(cost.disk, tokens))]


def _rate(counters: "Counters", tokens: int) -> str:
    """What was read, in all, for each token and in each second."""
    read = counters.demand_bytes + counters.prefetch_bytes
    rate = read / counters.read_seconds if counters.read_seconds else 0.0
    gigabytes = _show.gigabytes
    return f"{gigabytes(read)}, {gigabytes(read / tokens)} a token, {gigabytes(rate)}/s in each thread"
