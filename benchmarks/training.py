"""A training step of the plain recipe beside the same model in stock transformers; what routing costs in every recipe.

All contestants take turns in one process; a figure is the median over rounds of the ratio within one round. Stock
runs its experts by ``eager`` and ``grouped_mm`` (``batched_mm`` copies weights per token: 20 times slower here). Kept
bytes are what autograd saves between forward and backward. Writes training.json beside this file. ``--rounds N``,
``--threads N``, ``--recipes a,b``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moekit.errors import MoekitError
from moekit.nn import layer as layers
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


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds in routers and in balance terms, forward only."""
    forward, listen = Router.forward, layers.listen

    def clock(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = function(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return out

        return run

    Router.forward, layers.listen = clock("router", forward), clock("balance", listen)
    try:
        yield
    finally:
        Router.forward, layers.listen = forward, listen


def overhead(key: str, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Shares of a forward pass in training mode that routing and balance take."""
    model = Recipe.read(key).build().train()
    shares: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        spent: dict[str, float] = {}
        began = time.perf_counter()
        with timed(spent):
            model(input_ids=ids, labels=ids, use_cache=False)
        whole = time.perf_counter() - began
        if number:
            shares.append((spent.get("router", 0.0) / whole, spent.get("balance", 0.0) / whole))
    return {
        name: round(statistics.median(pair[i] for pair in shares), 3) for i, name in enumerate(("router", "balance"))
    }


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
        "share of a forward pass": shares,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
