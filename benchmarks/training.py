"""A training step of the plain recipe beside the same model in stock transformers; what routing costs in every recipe.

All contestants take turns in one process; a figure is the median over rounds of the ratio within one round. Stock
runs its experts by ``eager`` and ``grouped_mm`` (``batched_mm`` copies weights per token: 20 times slower here). Kept
bytes are what autograd saves between forward and backward; shares are of a whole step, forward and backward. Writes
training.json beside this file. ``--rounds N``, ``--threads N``, ``--recipes a,b``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moekit.errors import MoekitError
from moekit.nn import layer as layers
from moekit.nn.flow import carry
from moekit.nn.router import Router
from moekit.train.recipe import Recipe, recipes

BACKENDS = ("eager", "grouped_mm")


def stock(recipe: Recipe, backend: str) -> Any:
    """The plain recipe's architecture as its stock family."""
    config = recipe.config()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {
        name: getattr(config, name) for name in (*names, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    }
    family = Qwen3MoeConfig(
        **sizes,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(family, experts_implementation=backend)


def stepper(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """One optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def kept(model: Any, ids: torch.Tensor) -> int:
    """Bytes that the forward leaves for the backward, storages counted once, parameters not."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    return sum(seen.values())


class Spent:
    """Seconds by name: of calls, and of what autograd does for them in the backward, node by node.

    A node counts for whoever made it first; gradients added to parameters count for nobody.
    """

    def __init__(self) -> None:
        self.seconds, self.known, self.began = dict[str, float](), set[Any](), 0.0

    def add(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.began

    def begin(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def watch(self, name: str, made: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> None:
        """Count the nodes between two sets of tensors for ``name``."""
        ends, open_nodes = {tensor.grad_fn for tensor in given}, [tensor.grad_fn for tensor in made]
        while open_nodes:
            node = open_nodes.pop()
            if node is None or node in ends or node in self.known or type(node).__name__ == "AccumulateGrad":
                continue
            self.known.add(node)
            node.register_prehook(self.begin)
            node.register_hook(lambda *_: self.add(name))
            open_nodes.extend(follower for follower, _ in node.next_functions)


@contextmanager
def timed(spent: Spent) -> Iterator[None]:
    """Adds up the seconds in routers and in balance terms."""
    forward, listen = Router.forward, layers.listen

    def routed(router: Router, x: torch.Tensor, context: Any = None) -> Any:
        spent.begin()
        out = forward(router, x, context)
        spent.add("router")
        spent.watch("router", [one for one in out if one.grad_fn is not None], [x])
        return out

    def listened(terms: Any, weights: Any, seen: Any) -> None:
        losses = carry(seen.context).losses
        before = list(losses.values())
        spent.begin()
        listen(terms, weights, seen)
        spent.add("balance")
        spent.watch("balance", list(losses.values()), [seen.x_TH, *before])

    Router.forward, layers.listen = routed, listened
    try:
        yield
    finally:
        Router.forward, layers.listen = forward, listen


def overhead(key: str, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Shares of a training step that routing and balance take, forward and backward."""
    step = stepper(Recipe.read(key).build(), ids)
    shares: list[dict[str, float]] = []
    for number in range(rounds + 1):
        spent = Spent()
        began = time.perf_counter()
        with timed(spent):
            step()
        whole = time.perf_counter() - began
        if number:
            shares.append({name: spent.seconds.get(name, 0.0) / whole for name in ("router", "balance")})
    return {name: round(statistics.median(share[name] for share in shares), 3) for name in ("router", "balance")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", default=",".join(recipes()))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = Recipe.read("base")
    ids = torch.randint(0, 256, (16, base.length))
    models = {"moekit": base.build(), **{backend: stock(base, backend) for backend in BACKENDS}}
    steps = {name: stepper(model, ids) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(BACKENDS, key=medians.__getitem__)
    ratio = statistics.median(a / b for a, b in zip(seconds[best], seconds["moekit"], strict=True))
    memory = {name: kept(model, ids) for name, model in models.items()}
    models["moekit"].activation_checkpointing_enable({"use_reentrant": False})
    memory["moekit, layers recomputed"] = kept(models["moekit"], ids)
    shares = {}
    for key in options.recipes.split(","):
        try:
            shares[key] = overhead(key, ids, 3)
        except MoekitError as error:
            shares[key] = {"error": str(error)}
    found = {
        "machine": f"{platform.machine()}, {options.threads} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens": ids.numel(),
        "milliseconds": {name: round(1000 * value, 1) for name, value in medians.items()},
        "best of transformers": best,
        "speed-up over it": round(ratio, 3),
        "kept bytes": memory,
        "share of a step": shares,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
