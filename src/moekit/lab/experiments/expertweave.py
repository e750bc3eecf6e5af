"""ExpertWeave (n 125): do twenty adapters run in one batch, exactly, in the memory of the experts there are?

Setting: the embedded model in float32. Adapter i of 20 replaces, in every layer, the experts that ESFT's rule selects
on calibration text of domain i mod 4 for p = 0.1, 0.2, 0.3, 0.4 or 0.5 (gate scores), by noisy copies: what is tried is
serving, not training. One batch holds 21 sequences of held-out tokens: the base's and one of every adapter.

1. Logits of every sequence against those of the merged model on the same batch, bit for bit, in six batches of two
   tokens each: compiled kernels add in another order from 49 rows of an expert on, and the merged model's experts get
   more rows than ours. With 32 tokens each, where they do, the largest difference of the first five is reported.
2. Memory, from the blocks of the file it lies in, with pages of 4 KB and of 64 KB (no divisor of an expert): after
   loading all adapters, and at each of 40 random evictions and loadings, against the pages that kept experts touch;
   against the bound ceil(bytes / page) per tensor; against the padded tensor; and with all adapters gone.
3. CPU time of 32 tokens each, one thread, median of 5 in turn: mixed; the base alone on the plain kernels; one pass
   after the other, one for every adapter; and the base alone on the path of adapters.

Rule, written before the first run. `shown` if and only if no logit differs in any seed, memory is exactly that of the
pages touched at every step and at most 5 % above the bound with all loaded at 4 KB, and, with 95 % t intervals over
seeds, the mixed batch takes less time than the passes (interval of passes over mixed above 1) and at most 11 % more
than the base alone (interval of mixed over base below 1.11, the upper end of the paper's figure).
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.blocks import MoEBlock, blocks
from moekit.checkpoint import Checkpoint
from moekit.formats import DenseBank
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._caching import Reader
from moekit.lab.experiments._seeds import over_seeds
from moekit.run._adapters import Adapter
from moekit.run._adapters_live import AdaptedModel
from moekit.run.expertweave import ExpertWeave, fragmentation, memory_factor, relevance, select
from moekit.stream import LoadedModel

ADAPTERS, LENGTH, SHORT, LONG, REPEATS, STEPS = 20, 32, 6, 5, 5, 40
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
PAGES = (mmap.PAGESIZE, 16 * mmap.PAGESIZE)
LIMIT, SLACK = 1.11, 1.05


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return differing logits, bytes and times, and the rule's figures. ``text`` is not used."""
    threads, reader, found = torch.get_num_threads(), Reader(), []
    torch.set_num_threads(1)
    try:
        for done, seed in enumerate(seeds):
            advance(done, len(seeds))
            found.append(measure(reader, seed))
    finally:
        torch.set_num_threads(threads)
    figures = over_seeds(found)
    model = {name: reader.setting[name] for name in ("model", "fingerprint", "domains")}
    setting = {**model, "adapters": ADAPTERS, "sequence": LENGTH, "tokens": "held-out, 21 sequences a batch"}
    return Outcome(shown=holds(found, figures), figures=figures, setting=setting)


def holds(found: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    small = str(PAGES[0])
    exact = all(one["logits that differ"] == 0 for one in found)
    pages = all(one["memory"][str(page)]["steps off the pages touched"] == 0 for one in found for page in PAGES)
    bound = all(one["memory"][small]["over bound"] <= SLACK for one in found)
    ratio = figures["cpu time"]
    quick = ratio["passes over mixed"]["low"] > 1 and ratio["mixed over base"]["high"] < LIMIT
    return exact and pages and bound and quick


@torch.no_grad()
def measure(reader: Reader, seed: int) -> dict[str, Any]:
    """All figures of one seed."""
    adapters = adapters_of(reader, seed)
    most = max(adapter.largest for adapter in adapters)
    replaced = [[len(experts) for experts in adapter.experts] for adapter in adapters]
    base = reader.blocks[0].num_experts
    model, plain = fresh(reader), fresh(reader)
    plain.set_experts_implementation("moekit")
    weave = ExpertWeave(adapters=ADAPTERS, most=most).open(model)
    for number, adapter in enumerate(adapters):
        weave.load(str(number), adapter)
    rows = [row[:LENGTH] for rows in reader.rows("test", seed, 6).values() for row in rows]
    ids = torch.stack(rows[: ADAPTERS + 1])
    wrong, largest = differing(reader, model, weave, adapters, ids)
    return {
        "experts replaced per layer": float(np.mean(replaced)),
        "most": most,
        "fragmentation": float(np.mean([fragmentation(one) for one in replaced])),
        "memory factor": memory_factor(base, most, replaced),
        "logits that differ": wrong,
        "largest difference, long batches": largest,
        "cpu time": times(model, weave, plain, ids),
        "memory": {str(page): memory(reader, adapters, most, page, seed) for page in PAGES},
    }


def fresh(reader: Reader) -> PreTrainedModel:
    return LoadedModel.load(Checkpoint.open(reader.setting["model"]), dtype=torch.float32).model


def adapters_of(reader: Reader, seed: int) -> list[Adapter]:
    trace, draw = reader.trace("calibration", seed), torch.Generator().manual_seed(seed)
    found = []
    for number in range(ADAPTERS):
        own = trace.of_domain(reader.domains[number % len(reader.domains)])
        chosen = select(relevance(own), SHARES[number % len(SHARES)])
        banks = [noisy(block, experts, draw) for block, experts in zip(reader.blocks, chosen, strict=True)]
        found.append(Adapter(tuple(map(tuple, chosen)), tuple(banks)))
    return found


def noisy(block: MoEBlock, experts: Sequence[int], draw: torch.Generator) -> DenseBank:
    own = block.bank()
    assert isinstance(own, DenseBank)
    up, down = own.gate_up[list(experts)], own.down[list(experts)]
    up, down = (part + 0.2 * part.std() * torch.randn(part.shape, generator=draw) for part in (up, down))
    return DenseBank(up, down, None, None, own.activation)


def differing(
    reader: Reader, model: PreTrainedModel, weave: AdaptedModel, adapters: Sequence[Adapter], ids: Tensor
) -> tuple[int, float]:
    """How many logits are not, bit for bit, the merged models' in short batches, and the largest difference in all."""
    names = [None, *map(str, range(ADAPTERS))]
    batches = [*ids[:, : 2 * SHORT].split(2, dim=1), ids]
    with weave.serving(names):
        mixed = [model(batch).logits for batch in batches]
    other, wrong, largest = fresh(reader), 0, 0.0
    ExpertWeave(adapters=1, most=1).open(other)
    for row, adapter in enumerate((None, *adapters)):
        if adapter is not None:
            put(other, reader.blocks, adapter)
        wrong += sum(int((mixed[i][row] != other(batches[i]).logits[row]).sum()) for i in range(SHORT))
        if row < LONG:
            largest = max(largest, float((mixed[-1][row] - other(ids).logits[row]).abs().max()))
    return wrong, largest


def put(other: PreTrainedModel, origins: Sequence[MoEBlock], adapter: Adapter) -> None:
    """Make ``other`` the base merged with one adapter."""
    for block, origin, experts, own in zip(blocks(other), origins, adapter.experts, adapter.banks, strict=True):
        block.put(merged(origin, experts, own))


def merged(origin: MoEBlock, experts: Sequence[int], own: DenseBank | None) -> DenseBank:
    base = origin.bank()
    assert isinstance(base, DenseBank)
    up, down = base.gate_up.clone(), base.down.clone()
    if own is not None:
        up[list(experts)], down[list(experts)] = own.gate_up, own.down
    return DenseBank(up, down, None, None, base.activation)


def times(model: PreTrainedModel, weave: AdaptedModel, plain: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """Medians in milliseconds, and their ratios."""
    names = [None, *map(str, range(ADAPTERS))]

    def mixed(serve: Sequence[str | None], rows: Tensor) -> None:
        with weave.serving(serve):
            model(rows)

    def passes() -> None:
        for row, name in enumerate(names):
            mixed([name], ids[row : row + 1])

    ways: dict[str, Callable[[], Any]] = {
        "mixed": lambda: mixed(names, ids),
        "base": lambda: plain(ids),
        "base, path of adapters": lambda: mixed([None] * len(names), ids),
        "passes": passes,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            taken[name].append(1000 * (time.process_time() - start))
    median = {name: statistics.median(values[1:]) for name, values in taken.items()}  # the first call warms up
    ratios = {
        "mixed over base": median["mixed"] / median["base"],
        "mixed over base, path of adapters": median["mixed"] / median["base, path of adapters"],
        "passes over mixed": median["passes"] / median["mixed"],
    }
    return {**{f"{name} ms": value for name, value in median.items()}, **ratios}


def memory(reader: Reader, adapters: Sequence[Adapter], most: int, page: int, seed: int) -> dict[str, float]:
    """Bytes of one page size, and at how many random steps they were not those of the pages touched."""
    weave = ExpertWeave(adapters=ADAPTERS, most=most, page=page).open(fresh(reader))
    alone, draw = weave.frames.physical_bytes, np.random.default_rng(seed)
    for number, adapter in enumerate(adapters):
        weave.load(str(number), adapter)
    layers, full, wrong = weave.layers, weave.frames.physical_bytes, 0
    own = sum(len(layer.held) * sum(layer.row_bytes) for layer in layers)
    bound = sum(rounded(len(layer.held) * size, page) for layer in layers for size in layer.row_bytes)
    slots = layers[0].num_experts + ADAPTERS * most
    padded = sum(rounded(slots * size, page) for layer in layers for size in layer.row_bytes)
    for number in draw.integers(0, ADAPTERS, STEPS):
        if str(number) in weave.loaded:
            weave.evict(str(number))
        else:
            weave.load(str(number), adapters[number])
        wrong += weave.frames.physical_bytes != touched(weave, page)
    for name in weave.loaded:
        weave.evict(name)
    wrong += weave.frames.physical_bytes != alone
    return {
        "base alone MB": alone / 1e6,
        "all loaded MB": full / 1e6,
        "experts' own MB": own / 1e6,
        "padded MB": padded / 1e6,
        "over bound": full / bound,
        "padded over held": padded / full,
        "steps off the pages touched": float(wrong),
    }


def rounded(size: int, page: int) -> int:
    return -(-size // page) * page


def touched(weave: AdaptedModel, page: int) -> int:
    """Bytes of the pages on which anything of a kept expert lies."""
    found = 0
    for layer in weave.layers:
        for size in layer.row_bytes:
            found += len(
                {p for s in layer.held for p in range(s * size // page, rounded((s + 1) * size, page) // page)}
            )
    return found * page
