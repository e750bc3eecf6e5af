"""What the workers of test_outer.py do with the code under test."""

from datetime import timedelta
from pathlib import Path

import torch
from outer_by_hand import RATE, SCHEDULES, STEPS, WORLD, by_hand, flat_of, loss, network, sgd

from moekit.parallel._codec import codec
from moekit.parallel._outer_fragments import Averaged, OuterStep, Owned, by_layers
from moekit.parallel._outer_link import Link, SlowLink
from moekit.parallel.outer import OuterSync


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
