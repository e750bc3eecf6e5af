"""Product keys against all pairs, memories against their definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wholes import SIZES, leaks, lives, tiny, tokens

from moekit.errors import OptionError
from moekit.nn import MoekitConfig
from moekit.nn.parts import Site
from moekit.nn.product_keys import ProductKeys, ProductKeyScorer
from moekit.nn.rank_one import Memory
from moekit.nn.router import Router

CONFIG = MoekitConfig(**SIZES)
MEMORIES = {
    "vectors": {"keys": 6, "top": 3, "heads": 2, "values": "vectors"},
    "rank-one": {"keys": 6, "top": 3, "heads": 2},
    "raw": {"keys": 6, "top": 4, "rank": 2, "activation": "none", "weigh": "raw", "width": 12},
    "all pairs": {"keys": 6, "top": 2, "values": "vectors", "width": 8, "final": False, "gate": -2.0},
}


def keys(**options: int) -> ProductKeys:
    torch.manual_seed(0)
    found = ProductKeys(12, **{"keys": 7, "top": 4, **options})
    found.initialise(0.02)
    return found


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 99))
def test_the_best_pairs_of_shortlists_are_the_best_of_all(top: int, heads: int, seed: int) -> None:
    part = keys(top=top, heads=heads)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    item, score = part(x)
    torch.testing.assert_close(score, part.scores(x).topk(top, dim=-1).values)
    torch.testing.assert_close(part.scores(x).gather(2, item), score)
    assert all(len(set(row)) == top for row in item.flatten(0, 1).tolist())


def test_a_tucker_core_scores_exactly_what_it_finds_and_misses_some() -> None:
    part = keys(keys=24, top=8, rank=2)
    x = torch.randn(200, 12)
    item, score = part(x)
    every = part.scores(x)
    torch.testing.assert_close(every.gather(2, item), score)
    best = every.topk(8, dim=-1).indices
    recall = (item[..., None] == best[..., None, :]).any(-1).float().mean().item()
    assert 0.3 < recall < 0.999  # an approximation; pairs of two strongly negative halves are never found
    assert (score <= every.topk(8, dim=-1).values + 1e-5).all()


def test_all_pairs_of_the_shortlists() -> None:
    part = keys(top=3, final=False)
    x = torch.randn(4, 12)
    item, score = part(x)
    assert item.shape == (4, 1, 9)
    torch.testing.assert_close(part.scores(x).gather(2, item), score)
    row, column = (half[:, 0, 0].topk(3).indices for half in part.halves(x))
    expected = (row[:, :, None] * 7 + column[:, None]).flatten(1)
    assert torch.equal(item[:, 0].sort().values, expected.sort().values)


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 2}])
def test_the_best_scores_begin_near_one(options: dict) -> None:
    part = keys(keys=32, top=16, heads=4, key=64, **options)
    assert 0.8 < part(torch.randn(500, 12))[1].mean().item() < 1.25


def brute_force(memory: Memory, x: torch.Tensor) -> torch.Tensor:
    item, score = memory.find(x)
    out = torch.zeros(len(x), memory.value.shape[1])
    weight = score.softmax(-1) if memory.weigh == "softmax" else score
    for token in range(len(x)):
        for head in range(item.shape[1]):
            for number, w in zip(item[token, head], weight[token, head], strict=True):
                if memory.reader is not None:
                    inner = memory.reader[number] @ memory.in_proj(x[token])
                    w = w * (inner if memory.act_fn is None else memory.act_fn(inner))
                out[token] += w * memory.value[number]
    return memory.out_proj(out) * (1 if memory.opening is None else memory.opening(x).sigmoid())


@pytest.mark.parametrize("options", MEMORIES.values(), ids=MEMORIES)
def test_a_memory_is_the_sum_of_what_it_found(options: dict) -> None:
    memory = tiny(feed_forward={"kind": "memory", **options}).model.layers[0].mlp
    x = torch.randn(5, 32)
    torch.testing.assert_close(memory(x), brute_force(memory, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", MEMORIES.values(), ids=MEMORIES)
def test_lives_in_a_model(options: dict, tmp_path) -> None:
    model = lives(tmp_path, feed_forward={"kind": "memory", **options}, shared_expert_intermediate_size=8)
    assert not leaks(model)
    found = model(tokens()).expert_load
    assert [len(load) for load in found] == [36, 36]
    per_token = options["top"] ** 2 if options.get("final") is False else options["top"] * options.get("heads", 1)
    assert {int(load.sum()) for load in found} == {24 * per_token}


def test_padding_is_in_no_load() -> None:
    model = tiny(feed_forward={"kind": "memory", **MEMORIES["rank-one"]})
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    assert {int(load.sum()) for load in model(tokens(), attention_mask=mask).expert_load} == {19 * 3 * 2}


def test_one_memory_for_all_layers(tmp_path) -> None:
    model = lives(tmp_path, memory={"kind": "memory", **MEMORIES["all pairs"]})
    out = model(tokens())
    assert [len(load) for load in out.expert_load] == [4, 4]  # loads of layers are those of their experts alone
    assert [int(load.sum()) for load in out.other_load["memory"]] == [24 * 4] * 2
    assert sum("find.key" in name for name, _ in model.named_parameters()) == 1
    ids = tokens()
    before = model(ids).logits
    torch.nn.init.zeros_(model.model.memory.value)
    assert not torch.allclose(model(ids).logits, before)


@pytest.mark.parametrize("values", ["vectors", "rank-one"])
def test_neighbours_share_a_table_and_not_their_keys(values: str, tmp_path) -> None:
    told = {"kind": "memory", "keys": 6, "top": 3, "values": values, "width": 8, "share": 2}
    model = lives(tmp_path, feed_forward=told, num_hidden_layers=3)
    memories = [layer.mlp for layer in model.model.layers]
    assert memories[0].value is memories[1].value
    assert memories[1].value is not memories[2].value
    assert memories[0].reader is memories[1].reader
    assert (memories[0].reader is None) == (values == "vectors")
    assert not torch.equal(memories[0].find.key, memories[1].find.key)
    names = [name for name, _ in model.named_parameters() if name.endswith("mlp.value")]
    assert len(names) == 2  # trained and saved once for the two
    again = type(model).from_pretrained(tmp_path)
    assert again.model.layers[0].mlp.value is again.model.layers[1].mlp.value


def test_tables_begin_with_the_variance_of_a_feed_forward() -> None:
    """sigma_mem^2 = 0.16 (1 + s^2) sigma_V^4 P M V / H equals 0.064 (I / H) / (2 L)."""
    memory = Memory(CONFIG, 0, keys=16, top=8, rank=2, activation="none", weigh="raw", width=24)
    memory.initialise(0.02)
    sigma = memory.table_std()
    left = 0.16 * (1 + memory.find.spread()) * sigma**4 * 24 * 8 * 24 / 32
    assert left == pytest.approx(0.064 * CONFIG.intermediate_size / 32 / (2 * CONFIG.num_hidden_layers))
    assert memory.value.std().item() == pytest.approx(sigma, rel=0.05)
    beside = MoekitConfig(**SIZES, shared_expert_intermediate_size=CONFIG.intermediate_size // 16)
    smaller = Memory(beside, 0, keys=16, top=8, rank=2, activation="none", weigh="raw", width=24)
    assert smaller.table_std() == pytest.approx(sigma / 2)  # of the layer beside it


def test_a_scorer_by_product_keys(tmp_path) -> None:
    site = Site(hidden_size=12, intermediate_size=4, num_experts=9, top_k=2)
    scorer = ProductKeyScorer(site, key=5)
    scorer.keys.initialise(0.02)
    row, column = scorer.keys.halves(x := torch.randn(4, 12))
    expected = torch.stack([row[:, 0, 0, i] + column[:, 0, 0, j] for i in range(3) for j in range(3)], dim=1)
    torch.testing.assert_close(scorer(x, None), expected)
    lives(tmp_path, router={"score": {"kind": "product-key", "key": 8}}, num_experts=9)
    with pytest.raises(OptionError, match="product keys address a square of experts, and 8 is none"):
        Router(Site(hidden_size=4, intermediate_size=4, num_experts=8), {"score": "product-key"})


def test_edges() -> None:
    for options in MEMORIES.values():
        memory = tiny(feed_forward={"kind": "memory", **options}).model.layers[0].mlp
        assert memory(torch.zeros(0, 32)).shape == (0, 32)
        assert memory(torch.zeros(1, 32)).isfinite().all()
        assert memory(torch.full((2, 32), math.nan)).shape == (2, 32)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keys": 4, "top": 5}, "top=5 of 4 keys of a side: give 1 to 4"),
        ({"keys": 0, "top": 1}, "product keys need sizes from 1 on, got keys=0, heads=1, key=32, rank=1"),
        ({"keys": 4, "top": 2, "rank": 2, "final": False},
         "all pairs of the shortlists (final = false) can only be had with rank = 1"),
        ({"keys": 4, "top": 2, "share": 0}, "share=0 of a memory: give 1 for a table per layer, or more"),
        ({"keys": 4, "top": 2, "values": "rows"}, "a memory of 'rows': choose vectors or rank-one"),
        ({"keys": 4, "top": 2, "weigh": "mean"}, "weigh='mean' in a memory: choose softmax or raw"),
        ({"keys": 4, "top": 2, "activation": "sin"},
         "activation='sin' in a memory: choose none or one that transformers knows"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(options: dict, told: str) -> None:
    with pytest.raises(OptionError) as error:
        tiny(feed_forward={"kind": "memory", **options})
    assert str(error.value) == told
