"""The model, data and schedules of test_outer.py, and every schedule written down without the code under test."""

import torch
from torch import nn

from moekit.parallel._codec import codec

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


def flat_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


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
