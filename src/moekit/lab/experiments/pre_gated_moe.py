"""Pre-gated MoE (n 106): is a gate one block early as good as a normal one, and does paging never wait for experts?

Setting: the embedded model, all of it tuned on 512 tokens a step of its own training mixture for 40 steps at 5e-4,
cosine, in three ways from the same weights and on the same batches: with its normal gates, and with pre-gates, which
begin as the next block's gate. Untuned: the next gate on the current input as the routing (no step), and the model as
it is. Judged in bits per byte on 1 KiB of held-out text from each of all domains.

Paging: the tuned pre-gated model is saved and opened with two buffers of four experts each. From each of three prompts
of one token 16 tokens are decoded: reading ahead what was chosen, on demand, and reading ahead all of the next block
(which gets a buffer of all 16). Counted, not timed: experts that were not there or on their way after block 0, and
bytes. Modelled: time of a pass in units of an expert's transfer, load = experts to be read, at a compute time per block
of 2, 4 and 8 transfers: on demand, pipelined and read-all, all resident being the bound.

Rule, written before the first run. `shown` if and only if the 95 % t intervals over seeds say: untuned minus pre-gates
lies above zero; pre-gates minus normal gates lies below 0.02 bits per byte; and in no seed is an expert missed after
block 0. A gap that lies above 0.02 falsifies the claim of quality at this length of training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import LENGTH, LM, TOKENS
from moekit.lab.experiments._caching import gap
from moekit.lab.experiments._seeds import each_seed, over_seeds
from moekit.measure import bits_per_byte
from moekit.run.answer import prompt_ids
from moekit.run.paging import load
from moekit.run.pre_gated_moe import PreGated, on_demand, pipelined, pre_gates, read_ahead
from moekit.stream import LoadedModel
from moekit.train import TrainOptions, distil

STEPS, RATE, TEST_BYTES, MARGIN = 40, 5e-4, 1024, 0.02
PROMPTS, NEW = ("d", "T", "1"), 16
COMPUTE = (2.0, 4.0, 8.0)


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return bits per byte by contestant, misses and bytes of paging, modelled times. ``text`` is not used."""
    source = Checkpoint.open("moekit:mini")
    found = each_seed(seeds, advance, lambda seed: measure(source, seed))
    figures = summary(found)
    setting = {"model": "moekit:mini", "fingerprint": source.fingerprint, "steps": STEPS, "rate": RATE}
    return Outcome(shown=holds(figures), figures=figures, setting={**setting, "tokens_per_step": TOKENS})


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    rule = figures["rule"]
    return rule["untuned - pre-gates"]["low"] > 0 and rule["pre-gates - normal"]["high"] < MARGIN and not rule["missed"]


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bits = {name: [one["bits per byte"][name] for one in found] for name in found[0]["bits per byte"]}
    rule = {
        "untuned - pre-gates": gap(bits["untuned"], bits["pre-gates"]),
        "pre-gates - normal": gap(bits["pre-gates"], bits["normal"]),
        "missed": max(one["paging"]["chosen"]["missed after block 0"] for one in found),
    }
    return {**over_seeds(found), "modelled": modelled(), "rule": rule}


def measure(source: Checkpoint, seed: int) -> dict[str, Any]:
    """Figures of one seed."""
    normal = fresh(source)
    bits = {"as it is": loss(normal, source, seed)}
    with PreGated(normal, pre_gates(normal)):
        bits["untuned"] = loss(normal, source, seed)
    bits["normal"] = loss(tuned(normal, seed), source, seed)
    model = fresh(source)
    gates = pre_gates(model)
    with PreGated(model, gates):
        bits["pre-gates"] = loss(tuned(model, seed), source, seed)
    return {"bits per byte": bits, "paging": pages(model, gates, source)}


def fresh(source: Checkpoint) -> Any:
    model = LoadedModel.load(source, dtype=torch.float32).model
    model.set_experts_implementation("moekit")
    return model


def tuned(model: Any, seed: int) -> Any:
    """The model itself, all of it trained."""
    options = TrainOptions(steps=STEPS, learning_rate=RATE, course="cosine", seed=seed)
    distil(model, None, lab.mixture(seed, TOKENS, LENGTH), options, LM)
    return model


def loss(model: Any, source: Checkpoint, seed: int) -> float:
    """Bits per byte of held-out text, mean over domains."""
    texts = {domain: [lab.text(domain, "test", TEST_BYTES, seed)] for domain in lab.DOMAINS}
    scores = bits_per_byte(LoadedModel(model), texts, source.tokenizer(), length=LENGTH, batch_size=16)
    return sum(score.mean for score in scores.values()) / len(scores)


def pages(model: Any, gates: Any, source: Checkpoint) -> dict[str, dict[str, float]]:
    """By way of reading: what was missed after block 0, and experts' bytes per decoded token, in experts."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ("chosen", "on demand", "all"):
            paged = load(folder, context=NEW + 1)
            served = read_ahead(paged, gates, everything=name == "all")
            if name == "on demand":
                served.predictor = None
            served.history = []
            with PreGated(paged, gates):
                for prompt in PROMPTS:
                    decode(paged, prompt_ids(source.tokenizer(), prompt, chat=False)[:, -1:])
            first = sum(len(experts) for layer, experts in served.history if layer == 0)
            counters, size = served.store.counters, served.store.layers[0].stored_bytes[0]
            read = counters.demand_bytes + counters.prefetch_bytes
            found[name] = {
                "missed after block 0": float(max(counters.misses - first, 0)),
                "asked after block 0": float(counters.requests - first),
                "experts read per token": read / size / served.tokens,
                "experts of memory": served.store.budget / max(served.store.layers[0].charge),
            }
            served.close()
    return found


def decode(model: Any, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def modelled(blocks: int = 8, active: float = 4.0, everyone: float = 16.0) -> dict[str, dict[str, float]]:
    """Time of a pass over the compute of a resident model, by compute per block in transfers of one expert."""
    found = {}
    for compute in COMPUTE:
        work = [compute] * blocks
        ways = {
            "on demand": on_demand([active] * blocks, work),
            "chosen": pipelined([active] * blocks, work),
            "all": pipelined([active, *[everyone] * (blocks - 1)], work),
        }
        found[f"{compute:g}"] = {name: time / sum(work) for name, time in ways.items()}
    return found
