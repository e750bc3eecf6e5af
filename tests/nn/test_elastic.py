"""Courses that draw smaller models, and the smaller models inside a large one."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.blocks import blocks, select_experts
from moekit.errors import OptionError
from moekit.nn import MoekitConfig, MoekitForCausalLM, finish_step
from moekit.nn.elastic import restricted
from moekit.nn.moment import Moment
from moekit.nn.schedule import Schedule

SIZES = {"vocab_size": 40, "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 8, "num_hidden_layers": 4}
IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(3))
POOL, LAYERS, K = "model.layers.*.mlp.gate.pool", "model.layers.*.active", "model.layers.*.mlp.gate.selector.k"


def model(**options):
    torch.manual_seed(0)
    return MoekitForCausalLM(MoekitConfig(**SIZES, num_attention_heads=2, initializer_range=0.3, **options)).eval()


def history(lm, target, course, steps=200, seed=0):
    """The attribute in every layer at every step."""
    schedule = Schedule(lm, target, course)
    found = []
    for step in range(steps):
        schedule.apply(Moment(step, steps, seed))
        found.append([getattr(module, schedule.attribute) for module in schedule.modules])
    return found


def test_nested_candidates_are_prefixes_of_all_sizes():
    found = history(model(), POOL, {"kind": "candidates", "sizes": [1, 3, 8], "nested": True})
    sizes = set()
    for masks in found:
        counts = {8 if mask is None else int(mask.sum()) for mask in masks}
        assert len(counts) == 1  # one size for all routers of a step
        sizes |= counts
        assert all(mask is None or bool(mask[: int(mask.sum())].all()) for mask in masks)
    assert sizes == {1, 3, 8}


def test_candidates_are_drawn_for_each_router_with_the_chances_told():
    found = history(model(), POOL, {"kind": "candidates", "sizes": [3, 8], "chances": [0.2, 0.8]}, steps=500)
    few = [masks for masks in found if masks[0] is not None]
    assert 60 <= len(few) <= 140
    assert all(int(mask.sum()) == 3 for masks in few for mask in masks)
    assert any(not torch.equal(masks[0], masks[1]) for masks in few)
    use = torch.stack([mask for masks in few for mask in masks]).float().mean(0)
    assert use.min() > 0.25
    assert use.max() < 0.5


def test_members_are_as_many_layers_as_drawn():
    course = {"kind": "members", "sizes": [3, 4], "chances": [0.25, 0.75]}
    found = torch.tensor(history(model(), LAYERS, course, steps=400))
    assert 60 <= int((found.sum(1) == 3).sum()) <= 140
    assert set(found.sum(1).tolist()) == {3, 4}
    assert (~found).any(0).all()  # every layer is left out now and then
    nested = torch.tensor(history(model(), LAYERS, {"kind": "members", "sizes": [1, 2, 4], "nested": True}))
    assert {tuple(row) for row in nested.tolist()} == {(True,) * n + (False,) * (4 - n) for n in (1, 2, 4)}


def test_schedules_draw_independently_and_every_step_can_be_replayed():
    half = {"sizes": [4, 8], "chances": [0.5, 0.5]}
    width = [masks[0] is None for masks in history(model(), POOL, {"kind": "candidates", **half})]
    slots = [ks[0] == 2 for ks in history(model(), K, {"kind": "draw", "values": [1, 2]})]
    depth = [all(row) for row in history(model(), LAYERS, {"kind": "members", "sizes": [2, 4]})]
    for one, other in ((width, slots), (slots, depth), (width, depth)):
        agree = sum(a == b for a, b in zip(one, other, strict=True))
        assert 70 <= agree <= 130
    assert depth == [all(row) for row in history(model(), LAYERS, {"kind": "members", "sizes": [2, 4]})]
    assert depth != [all(row) for row in history(model(), LAYERS, {"kind": "members", "sizes": [2, 4]}, seed=1)]


def test_pools_grow_and_differ_from_router_to_router():
    found = history(model(), POOL, {"kind": "pool", "own": 0.25, "begin": 0.2, "until": 0.6})
    counts = [8 if masks[0] is None else int(masks[0].sum()) for masks in found]
    assert counts == sorted(counts)
    assert (counts[0], counts[39], counts[120]) == (2, 2, 8)
    assert 2 < counts[80] < 8
    assert any(not torch.equal(masks[0], masks[1]) for masks in found[:40])


def test_some_experts_are_the_model_without_the_others():
    lm = model()
    small = copy.deepcopy(lm)
    select_experts(small, {block.name: [0, 1, 2] for block in blocks(small)})
    with restricted(lm, experts=3):
        torch.testing.assert_close(lm(IDS).logits, small(IDS).logits)
        mask = torch.tensor([False, True] * 4)
    chosen = copy.deepcopy(lm)
    select_experts(chosen, {block.name: [1, 3, 5, 7] for block in blocks(chosen)})
    with restricted(lm, experts=mask):
        torch.testing.assert_close(lm(IDS).logits, chosen(IDS).logits)


def test_some_layers_are_the_model_without_the_others(tmp_path):
    lm = model()
    state = {name: tensor for name, tensor in lm.state_dict().items() if ".layers.3." not in name}
    short = MoekitForCausalLM(MoekitConfig(**SIZES | {"num_hidden_layers": 3}, num_attention_heads=2)).eval()
    short.load_state_dict(state)
    run = {"max_new_tokens": 4, "do_sample": False}
    with restricted(lm, layers=3):
        torch.testing.assert_close(lm(IDS).logits, short(IDS).logits)
        assert torch.equal(lm.generate(IDS, **run), short.generate(IDS, **run))
    with restricted(lm, layers=[False, True, True, True]):
        assert torch.equal(lm.generate(IDS, **run), lm.generate(IDS, use_cache=False, **run))
    torch.testing.assert_close(lm(IDS).logits, model()(IDS).logits)  # all is as it was


def test_fewer_slots():
    lm = model(num_experts_per_tok=4)
    with restricted(lm, k=1, experts=8):
        loads = lm(IDS).expert_load
    assert [int(load.sum()) for load in loads] == [IDS.numel()] * 4
    assert [int(load.sum()) for load in lm(IDS).expert_load] == [4 * IDS.numel()] * 4


def test_experts_of_other_kinds_stay():
    lm = model(others=["zero"], num_experts_per_tok=3)
    with restricted(lm, experts=2):
        loads = lm(IDS).expert_load
    for load in loads:
        assert load.tolist() == [IDS.numel()] * 2 + [0] * 6 + [IDS.numel()]


def test_load_loss_and_bias_know_who_was_no_candidate():
    lm = model(balance={"load": 1.0, "importance": 1.0}, correction={"rate": 0.1}).train()
    for layer in lm.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.scorer.weight)
    with restricted(lm, experts=4):
        out = lm(IDS, labels=IDS)
        finish_step(lm)
    # Candidates are equally probable: 1 a layer whatever the load, and no variation.
    torch.testing.assert_close(out.losses["load"], torch.tensor(4.0))
    torch.testing.assert_close(out.losses["importance"], torch.tensor(0.0))
    for layer in lm.model.layers:
        assert not layer.mlp.gate.bias[4:].any()  # an expert that could not be chosen is not helped
        assert layer.mlp.gate.bias[:4].any()


def test_a_layer_that_is_left_out_learns_nothing_and_is_not_corrected():
    lm = model(correction={"rate": 0.1}).train()
    with restricted(lm, layers=2):
        lm(IDS, labels=IDS).loss.backward()
        finish_step(lm)
    out = lm.model.layers[2]
    assert all(p.grad is None for p in out.parameters())
    assert not out.mlp.gate.bias.any()
    assert lm.model.layers[1].mlp.gate.bias.any()


def test_saved_and_loaded_a_model_is_whole(tmp_path):
    lm = model()
    expected = lm(IDS).logits
    with restricted(lm, layers=2, experts=3, k=1):
        lm.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("ids", [IDS[:1, :1]])
def test_one_token(ids):
    lm = model(correction={"rate": 0.1}, balance={"load": 0.01}).train()
    with restricted(lm, experts=1, k=1, layers=1):
        assert lm(ids).logits.shape == (*ids.shape, 40)
        finish_step(lm)
    assert not lm.model.layers[0].mlp.gate.bias.any()  # one candidate is as loaded as the mean of candidates


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 5}, "the first 5 layers of 4: give 1 to 4"),
        ({"layers": [False] * 4}, "mark one of 4 at least"),
        ({"experts": 0}, "the first 0 experts of 8: give 1 to 8"),
        ({"experts": torch.ones(3, dtype=torch.bool)}, "mark one of 8 at least"),
        ({"k": 9}, "top-k of 9 among 8 experts: give 1 to 8"),
    ],
)
def test_bad_restrictions_leave_the_model_alone(options, says):
    lm = model()
    with pytest.raises(OptionError, match=says), restricted(lm, **options):
        pass
    assert all(layer.active and layer.mlp.gate.pool is None for layer in lm.model.layers)


def test_slots_that_groups_do_not_divide():
    lm = model(router={"select": {"kind": "grouped", "groups": 2}}, num_experts_per_tok=4)
    with pytest.raises(OptionError, match="2 groups do not divide 8 experts and 1 slots"), restricted(lm, k=1):
        pass
    assert {layer.mlp.gate.selector.k for layer in lm.model.layers} == {4}


def test_no_number_of_slots():
    lm = model(router={"select": {"kind": "top-p", "p": 0.5}})
    with pytest.raises(OptionError, match="TopP has no number of slots that could be 1"), restricted(lm, k=1):
        pass


@pytest.mark.parametrize(
    ("course", "says"),
    [
        ({"kind": "candidates", "sizes": []}, "give whole numbers from 1 on"),
        ({"kind": "candidates", "sizes": [0, 2]}, "give whole numbers from 1 on"),
        ({"kind": "members", "sizes": [1, 2], "chances": [1.0]}, "2 sizes need as many chances"),
        ({"kind": "members", "sizes": [1], "chances": [0.0]}, "1 sizes need as many chances"),
    ],
)
def test_bad_courses(course, says):
    with pytest.raises(OptionError, match=says):
        Schedule(model(), POOL, course)
