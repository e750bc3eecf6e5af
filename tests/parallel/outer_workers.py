"""What the workers of test_outer.py do, and the same written down once more without any of the code under test."""

import json
import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from moekit.errors import MoekitError
from moekit.parallel._codec import codec
from moekit.parallel._outer_fragments import Averaged, OuterStep, Owned, by_layers
from moekit.parallel._outer_link import Link, SlowLink
from moekit.parallel.outer import OuterSync

WORLD, RATE = 3, 0.1
SCHEDULES = {
    "mean": {"every": 4},
    "diloco": {"every": 4, "learning_rate": 0.7, "momentum": 0.9},
    "fragments": {"every": 4, "learning_rate": 0.7, "momentum": 0.9, "parts": 2},
    "overlap": {"every": 4, "learning_rate": 0.4, "momentum": 0.9, "parts": 2, "delay": 1, "mix": 0.5},
    "four bits": {"every": 4, "learning_rate": 0.4, "momentum": 0.9, "parts": 2, "delay": 3, "mix": 0.5, "code": "fp4"},
    "bfloat16": {"every": 3, "parts": 2, "delay": 1, "mix": 0.25, "code": "bfloat16"},
}
STEPS = 10


def network():
    """Two numbered layers and one without a number; the same everywhere."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), "head": nn.Linear(6, 1)})
    return net.double().float()


def loss(net, worker, step):
    draw = torch.Generator().manual_seed(1000 * worker + step)
    x = torch.randn(16, 6, generator=draw)
    for layer in net["layers"]:
        x = layer(x).tanh()
    return (net["head"](x)[:, 0] - torch.randn(16, generator=draw) - worker).square().mean()


def sgd(net, worker, step):
    net.zero_grad()
    loss(net, worker, step).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= RATE * p.grad


def fragments(net, options):
    outer = OuterStep(
        learning_rate=options.get("learning_rate", 1.0),
        momentum=options.get("momentum", 0.0),
        mix=options.get("mix", 0.0),
    )
    parts, code = options.get("parts", 1), codec(options.get("code", "float32"))
    groups = by_layers(dict(net.named_parameters()), 2 // parts)
    return [
        Averaged(f"fragment {i}", list(group.values()), outer, code, i * options["every"] // parts)
        for i, group in enumerate(groups)
    ]


def synced(net, link, options, **more):
    return OuterSync(fragments(net, options), link, every=options["every"], delay=options.get("delay", 0), **more)


def by_hand(options, steps=STEPS):
    """All workers in one place: torch's own SGD as outer optimiser, one parameter at a time."""
    nets, common = [network() for _ in range(WORLD)], network()
    parts, every, delay = options.get("parts", 1), options["every"], options.get("delay", 0)
    owner = {
        name: int(name.split(".")[1]) % parts if name[:6] == "layers" else 0 for name, _ in common.named_parameters()
    }
    names = [[name for name, part in owner.items() if part == i] for i in range(parts)]
    table = dict(common.named_parameters())
    outer = [
        torch.optim.SGD(
            [table[name] for name in names[i]],
            lr=options.get("learning_rate", 1.0),
            momentum=options.get("momentum", 0.0),
            nesterov=bool(options.get("momentum")),
        )
        for i in range(parts)
    ]
    sent, begun, code = {}, [0] * parts, codec(options.get("code", "float32"))

    def mean(i):
        """Mean difference of fragment i now, by parameter."""
        flats = []
        for net in nets:
            mine = dict(net.named_parameters())
            flat = torch.cat([(table[n] - mine[n]).detach().flatten() for n in names[i]])
            flats.append(code.decode(code.encode(flat), len(flat)))
        pieces = torch.stack(flats).mean(0).split([table[n].numel() for n in names[i]])
        return {n: piece.view(table[n].shape) for n, piece in zip(names[i], pieces, strict=True)}

    def write(i, mix):
        with torch.no_grad():
            for net in nets:
                for n in names[i]:
                    p = dict(net.named_parameters())[n]
                    p.copy_(mix * p + (1 - mix) * table[n])

    def use(i, mix):
        for n, d in sent.pop(i)[1].items():
            table[n].grad = d.clone()
        outer[i].step()
        write(i, mix)

    for step in range(1, steps + 1):
        for worker, net in enumerate(nets):
            sgd(net, worker, step)
        for i in range(parts):
            if i in sent and sent[i][0] + delay == step:
                use(i, options.get("mix", 0.0))
            if (step - i * every // parts) % every == 0:
                sent[i], begun[i] = (step, mean(i)), step
                if delay == 0:
                    use(i, options.get("mix", 0.0))
    for i in range(parts):
        if i in sent:
            use(i, 0.0 if begun[i] == steps else options.get("mix", 0.0))
        if begun[i] < steps:
            with torch.no_grad():
                for n, d in mean(i).items():
                    table[n] -= d
            write(i, 0.0)
    return flat_of(common)


def flat_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def spread(link, net):
    """Whether all workers hold the same bits."""
    got = link.gather(flat_of(net), "comparison").take()
    return all(torch.equal(got[0], other) for other in got)


def run_schedule(options, group):
    link, net = Link(group), network()
    sync = synced(net, link, options)
    for step in range(1, STEPS + 1):
        sgd(net, link.rank, step)
        sync(step)
    sync.finish(STEPS)
    traffic = vars(link.traffic).copy()
    sizes = [[f.nbytes, len(f.common)] for f in sync.fragments]
    return {
        "off": float((flat_of(net) - by_hand(options)).abs().max()),
        "same": spread(link, net),
        "traffic": traffic,
        "sizes": sizes,
    }


def one_step_each():
    """H = 1, plain mean, SGD: the step of one process on the mean of all workers' losses."""
    link, net, alone = Link(), network(), network()
    sync = synced(net, link, {"every": 1})
    for step in range(1, 6):
        sgd(net, link.rank, step)
        sync(step)
        alone.zero_grad()
        sum(loss(alone, worker, step) for worker in range(WORLD)).div(WORLD).backward()
        with torch.no_grad():
            for p in alone.parameters():
                p -= RATE * p.grad
    return float((flat_of(net) - flat_of(alone)).abs().max())


def resumed(folder):
    """A run stopped after step 6, in flight, and taken up; against one that was not."""
    options = SCHEDULES["four bits"]
    link, straight, net = Link(), network(), network()
    whole = synced(straight, link, options)
    first = synced(net, link, options, folder=folder, save_every=3)
    for step in range(1, STEPS + 1):
        sgd(straight, link.rank, step)
        whole(step)
    whole.finish(STEPS)
    for step in range(1, 7):
        sgd(net, link.rank, step)
        first(step)
    flying = len(first._flying)
    kept = {name: p.detach().clone() for name, p in net.named_parameters()}
    again = network()
    second = synced(again, link, options, folder=folder, save_every=3)
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(kept[name])
    for step in range(7, STEPS + 1):
        sgd(again, link.rank, step)
        second(step)
    second.finish(STEPS)
    files = sorted(path.name for path in Path(folder).iterdir())
    return {"same": torch.equal(flat_of(again), flat_of(straight)), "flying": flying, "files": files}


def really_in_flight(store):
    """Worker 1 begins its exchange only after worker 0 has trained on for two steps with its own in flight."""
    options = {"every": 4, "delay": 2}
    link, net = Link(timeout=20), network()
    sync = synced(net, link, options)
    for step in range(1, 8):
        sgd(net, link.rank, step)
        if step == 4 and link.rank == 1:
            store.wait(["trained on"], timedelta(seconds=15))
        sync(step)
        if step == 5 and link.rank == 0:
            store.set("trained on", "yes")
    sync.finish(7)
    return spread(link, net)


def owned():
    """Each worker trains one row; a copy of each goes to all others, and nothing else changes."""
    link = Link()
    stack = torch.arange(WORLD * 2.0).view(WORLD, 2).clone()
    own = stack[link.rank : link.rank + 1]
    sync = OuterSync(
        [Owned("rows", [own], [[stack[w]] for w in range(WORLD)], link.rank, codec("float32"))], link, every=2
    )
    seen = []
    for step in range(1, 4):
        own += link.rank + 1
        sync(step)
        seen.append(stack.flatten().tolist())
    sync.finish(3)
    return {"seen": seen, "end": stack.flatten().tolist(), "traffic": vars(link.traffic).copy()}


def sharing():
    link = Link()
    mine = [torch.full((3,), float(link.rank)), torch.full((2, 2), float(link.rank))]
    link.share(mine)
    return {"sum": float(sum(t.abs().sum() for t in mine)), "bytes": link.traffic.shared}


def emulated():
    """One exchange over an emulated link."""
    link = Link(slow=SlowLink(bandwidth=1e5, latency=0.01))
    link.gather(torch.zeros(500, dtype=torch.uint8), "slow").take()
    return {"needed": link.traffic.needed, "stalled": link.traffic.stalled}


def said(do):
    try:
        do()
    except MoekitError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mistakes(folder):
    """One line for each way in which workers may differ or go wrong."""
    found = {}

    def begin(options, done=0, change=0.0, **more):
        net = network()
        with torch.no_grad():
            next(net.parameters()).add_(change)
        synced(net, Link(), options, **more)(done + 1)

    rank, options = dist.get_rank(), SCHEDULES["four bits"]
    earlier = Path(f"{folder} earlier")
    earlier.mkdir()
    shutil.copy(folder / "outer-00000009.safetensors", earlier)
    found["schedule"] = said(lambda: begin({"every": 4 + (rank == 1)}))
    found["weights"] = said(lambda: begin({"every": 4}, change=float(rank == 2)))
    found["no folder"] = said(lambda: begin({"every": 4}, done=5))
    found["other step"] = said(lambda: begin(options, done=5, folder=folder))
    found["other run"] = said(lambda: begin({"every": 5}, done=9, folder=folder))
    late = {"done": 10, "folder": folder} if rank else {"done": 9, "folder": earlier}
    found["step"] = said(lambda: begin(options, **late))
    found["timeout"] = said(lambda: Link(timeout=0.0))
    with patch.object(dist, "get_backend", return_value="nccl"):
        found["nccl"] = said(Link)
    net = network()
    sync = synced(net, Link(), {"every": 4})
    sync(1)
    found["skipped"] = said(lambda: sync(3))
    with torch.no_grad():
        next(net.parameters()).mul_(float("nan"))
    found["not finite"] = said(lambda: [sync(step) for step in (2, 3, 4)])
    return found


def left_alone(store):
    """A worker that does not come, and one that is killed in the middle of an exchange."""
    late = dist.new_group(timeout=timedelta(seconds=30))
    rank, found = dist.get_rank(), {}
    if rank != 2:
        start = time.monotonic()
        found["late"] = said(lambda: Link(late, timeout=1.0).sum(torch.zeros(4), "fragment 0").take())
        found["late took"] = time.monotonic() - start
    dead = dist.new_group(timeout=timedelta(seconds=30))
    link = Link(dead, timeout=20)
    big = torch.zeros(2_000_000)
    if rank == 2:
        store.wait(["begun"], timedelta(seconds=20))
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    pending = link.sum(big, "fragment 1")
    store.set("begun", "yes")
    found["killed"] = said(pending.take)
    found["killed took"] = time.monotonic() - start
    found["afterwards"] = said(lambda: link.sum(big, "fragment 2").take())
    return found


def work(rank, folder):
    """Entry of each process; writes what it found."""
    folder = Path(folder)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    found = {"schedules": {name: run_schedule(options, None) for name, options in SCHEDULES.items()}}
    found["one step"] = one_step_each()
    found["resumed"] = resumed(folder / f"state {rank}")
    found["in flight"] = really_in_flight(store)
    found["owned"], found["sharing"], found["emulated"] = owned(), sharing(), emulated()
    found["mistakes"] = mistakes(folder / f"state {rank}")
    (folder / f"found {rank}.json").write_text(json.dumps(found))
    found |= {"alone": left_alone(store)}
    (folder / f"found {rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the default group has lost a member: nothing is left to be said goodbye to
