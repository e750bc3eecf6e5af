"""What the two workers of test_outer_rows.py do: SPES and Streaming DiLoCo on stock models, under the stock Trainer."""

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from outer_mistakes import said
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moekit.parallel._outer_apart import apart
from moekit.parallel._outer_link import Link
from moekit.parallel.spes import Spes
from moekit.parallel.streaming_diloco import StreamingDiLoCo
from moekit.train import Objective, TrainOptions, batches_of, distil, loop

WORLD, EXPERTS = 2, 6
LM = Objective(kl=0.0, lm=1.0)
SPES = Spes(every=2, merge=0.1, merge_every=4, merge_decay=8, peers=2)
STREAMING = StreamingDiLoCo(every=4, layers=1, delay=1)


def model(seed=0, experts=EXPERTS):
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    return Qwen3MoeForCausalLM(config)


def batches(worker):
    draw = torch.Generator().manual_seed(worker)
    return batches_of([torch.randint(0, 40, (10,), generator=draw) for _ in range(12)], 4, worker)


def gradients(net, worker, step):
    net.zero_grad()
    ids = batches(worker)(step)["input_ids"]
    logits = net(input_ids=ids, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()


def descend(net, rate=0.5):
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= rate * p.grad


def state(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def masked_steps(same):
    """Three steps of SGD with H = 1, against one process: mean gradients of what is shared, the owner's of experts."""
    link, net, alone = Link(), model(), model()
    sync = Spes(every=1, merge=0.0, merge_every=1).attach(net, link)
    for step in range(1, 4):
        gradients(net, 0 if same else link.rank, step)
        descend(net)
        sync(step)
        each = []
        for worker in range(WORLD):
            gradients(alone, 0 if same else worker, step)
            each.append({name: p.grad.clone() for name, p in alone.named_parameters()})
        for name, p in alone.named_parameters():
            p.grad = (each[0][name] + each[1][name]) / 2
            if ".experts." in name:
                p.grad[:3], p.grad[3:] = each[0][name][:3], each[1][name][3:]
        descend(alone)
    sync.finish(3)
    return off(state(net), state(alone))


def off(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def memory():
    """Bytes of AdamW's state and of one exchange, and the numbers that there are."""
    link, net = Link(), model()
    experts = sum(p.numel() for name, p in net.named_parameters() if ".experts." in name)
    shared = sum(p.numel() for p in net.parameters()) - experts
    sync = SPES.attach(net, link)
    before = link.traffic.uploaded
    optimizer = torch.optim.AdamW(net.parameters())
    for step in (1, 2):
        gradients(net, 0, step)
        optimizer.step()
        sync(step)
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    found = {
        "experts": experts,
        "shared": shared,
        "moments": sum(t.numel() for t in moments),
        "gradients": sum(p.grad.numel() for p in net.parameters() if p.grad is not None),
        "uploaded": link.traffic.uploaded - before,
        "broadcast": link.traffic.shared,
    }
    sync.finish(2)
    return found


def trained(row, folder=None, steps=8, stop=None):
    """A run under the Trainer; ``stop`` breaks it off after so many steps."""
    link, net = Link(), model(seed=dist.get_rank())
    sync = row.attach(net, link, folder=folder, save_every=2)

    def after(step):
        sync(step)
        if step == stop:
            raise KeyboardInterrupt

    options = TrainOptions(steps=steps, learning_rate=1e-2)
    try:
        record = distil(net, None, batches(link.rank), options, LM, folder=folder, after_step=after)
    except KeyboardInterrupt:
        return None
    sync.finish(steps)
    return state(net), record.losses


def resumed(row, folder):
    """Broken off in step 5, taken up after 4."""
    straight, _ = trained(row)
    assert trained(row, folder, stop=5) is None
    again, losses = trained(row, folder)
    return {"same": all(torch.equal(straight[name], again[name]) for name in straight), "losses": len(losses)}


def one_model(tensors):
    """Whether both workers hold the same bits."""
    flat = torch.cat([t.flatten() for t in tensors.values()])
    got = Link().gather(flat, "comparison").take()
    return torch.equal(got[0], got[1])


def untouched():
    """Before the first exchange, a worker trains exactly as it would alone: the Trainer averages nothing."""
    net, other = model(), model()
    options = TrainOptions(steps=3, learning_rate=1e-2)
    distil(net, None, batches(dist.get_rank()), options, LM)
    sync = StreamingDiLoCo(every=50, layers=2, delay=0).attach(other, Link())
    distil(other, None, batches(dist.get_rank()), options, LM, after_step=sync)
    return {"same": off(state(net), state(other)) == 0, "one model": one_model(state(other))}


def work(rank, folder):
    """Entry of each process, in an environment as torchrun makes it."""
    folder = Path(folder)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    loop.SAVE_EVERY = 2
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    with apart():
        found = {"masked": {str(same): masked_steps(same) for same in (True, False)}, "memory": memory()}
        found["untouched"] = untouched()
        rows = {"spes": SPES, "streaming": STREAMING}
        found["one model"] = {name: one_model(trained(row)[0]) for name, row in rows.items()}
        found["resumed"] = {name: resumed(row, folder / f"{name} {rank}") for name, row in rows.items()}
        uneven = model(experts=5)
        found["uneven"] = said(lambda: Spes().attach(uneven, Link()))
        found["peers"] = said(lambda: Spes(peers=6).attach(model(), Link()))
    found["told again"] = os.environ["WORLD_SIZE"]
    (folder / f"found {rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
