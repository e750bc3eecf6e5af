"""The league: equal compute is counted, leads are seed by seed, the document says what was done."""

import json
from dataclasses import replace

import pytest
import torch

from moekit.errors import OptionError
from moekit.lab import league
from moekit.lab.experiments import _league as protocol
from moekit.nn import MoE
from moekit.nn.recurrent import GRU


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The protocol with next to no training and text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(protocol, "TEST_BYTES", 512)
    whole = protocol.contestant
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "moe_intermediate_size": 8, "num_experts": 8}
    monkeypatch.setattr(
        league, "contestant", lambda key: whole(key, train={"steps": 6}, **sizes).with_model(num_experts_per_tok=2)
    )


def test_recipes_are_ranked_at_equal_compute(small, tmp_path):
    entered = league.entrants(["moge"])
    entered["wide"] = entered["base"].with_model(num_experts_per_tok=8)
    del entered["moge"]
    told = list[tuple[int, int]]()
    rows = league.standings(entered, (1, 2), lambda done, total: told.append((done, total)))
    assert told == [(done, len(told)) for done in range(2 * (2 + league.ROUNDS))]
    by_name = {row.recipe: row for row in rows}
    assert [row.bits_per_byte.mean for row in rows] == sorted(row.bits_per_byte.mean for row in rows)
    assert by_name["base"].compute == pytest.approx(1)
    assert by_name["base"].lead.mean == 0
    assert by_name["base"].step_time == 1
    assert by_name["wide"].step_time > 0
    assert by_name["wide"].speed > 0
    assert by_name["wide"].steps < 6
    assert by_name["wide"].active > by_name["base"].active
    assert by_name["wide"].compute == pytest.approx(1, abs=0.1)
    text = league.markdown(rows, (1, 2), "Here.")
    assert text.count("| base |") == 2
    league.draw(rows, tmp_path / "league.png")
    assert (tmp_path / "league.png").stat().st_size > 0
    assert json.loads(json.dumps([row.as_dict() for row in rows]))


def test_what_was_trained_is_taken_from_the_cache_with_its_weights(small, monkeypatch):
    recipe = league.contestant("base")
    once = protocol.play(recipe, 3)
    model = protocol.at_hand(recipe, 3)
    monkeypatch.setattr(protocol, "trained", lambda *_: pytest.fail("trained again"))
    assert protocol.play(recipe, 3) == json.loads(json.dumps(once))
    assert protocol.judged(model, 3)["bits"] == once["bits"]


def test_what_was_kept_with_fewer_figures_is_trained_again(small):
    recipe = league.contestant("base")
    once = protocol.play(recipe, 3)
    (kept,) = protocol.cache().glob("*.json")
    kept.write_text(json.dumps({name: value for name, value in once.items() if name != protocol.USED}))
    assert protocol.play(recipe, 3)[protocol.USED] == once[protocol.USED]


def test_a_memory_after_every_layer_counts_for_every_layer():
    memory = {"kind": "memory", "keys": 4, "top": 2, "width": 8}
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "moe_intermediate_size": 8, "num_experts": 4}
    ids, active = torch.zeros(1, 5, dtype=torch.int64), {}
    for name, told in {"without": None, "after every layer": memory}.items():
        model = protocol.contestant("base").with_model(**sizes, memory=told).build().eval()
        with protocol.Use(model) as use:
            for _ in range(2):
                model(input_ids=ids, use_cache=False)
        active[name] = use.active(2 * ids.numel())
    assert active["after every layer"] - active["without"] == 3 * model.model.memory.active_parameters()


def test_a_cell_that_layers_share_counts_for_each_of_them():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "moe_intermediate_size": 8, "num_experts": 4}
    model = protocol.contestant("rmoe").with_model(**sizes, router={"score": {"width": 8}}).build().eval()
    (cell,) = (module for module in model.modules() if isinstance(module, GRU))
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with protocol.Use(model) as use:
        model(input_ids=ids, use_cache=False)
    idle = sum(protocol.size(bank) for bank in use.slots) * (1 - model.config.num_experts_per_tok / 4)
    assert use.active(5) == pytest.approx(protocol.size(model) - idle + 2 * protocol.size(cell))


def test_experts_of_another_kind_count_where_they_are_chosen():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "moe_intermediate_size": 8, "num_experts": 3}
    model = protocol.contestant("hecto").with_model(**sizes, others=[{"kind": "gru", "width": 8}]).build().eval()
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    ids = torch.arange(10)[None]
    with torch.no_grad(), protocol.Use(model) as use:
        load = model(input_ids=ids, use_cache=False).expert_load
    experts = sum(
        float(count[:3].sum()) / 10 * protocol.size(layer.experts) / 3
        + float(count[3]) / 10 * protocol.size(layer.others[0])
        for layer, count in zip(layers, load, strict=True)
    )
    idle = sum(protocol.size(layer.experts) + protocol.size(layer.others[0]) for layer in layers)
    assert use.active(10) == pytest.approx(protocol.size(model) - idle + experts)


def test_micro_batches_are_one_batch_dealt_out():
    whole = protocol.contestant()
    dealt = replace(protocol.contestant(train={"accumulate": 4}), batch=2)
    for step in range(2):
        parts = [protocol.batches(dealt)(4 * step + number)["input_ids"] for number in range(4)]
        assert all(len(part) == 2 for part in parts)
        assert torch.equal(torch.cat(parts), protocol.batches(whole)(step)["input_ids"])
    assert protocol.size_of_step(dealt) == protocol.size_of_step(whole) == 1024


def test_equal_compute_counts_what_schedules_did_on_the_way(small):
    course = {"kind": "steps", "values": [8, 2], "at": [0.5]}
    entry = {"set": "model.layers.*.mlp.gate.selector.k", "course": course}
    plain = league.contestant("base")
    entered = {"base": plain, "fewer and fewer": replace(plain, schedule=(entry,))}
    matched = league.equal(entered, 1, lambda done: None)
    per_expert = 3 * 16 * 8 * 2  # of both layers
    played = {name: protocol.play(recipe, 1) for name, recipe in entered.items()}
    assert played["base"]["active"] == played["base"]["active_in_training"] == played["fewer and fewer"]["active"]
    assert played["fewer and fewer"]["active_in_training"] == played["base"]["active"] + 3 * per_expert
    assert matched["base"].options.steps == 6
    assert matched["fewer and fewer"].options.steps == round(
        6 * played["base"]["active"] / (played["base"]["active"] + 3 * per_expert)
    )


def test_one_seed_is_no_interval(small):
    with pytest.raises(OptionError, match="at least two different seeds"):
        league.standings(league.entrants(["base"]), (1, 1), lambda done, total: None)


def test_a_missing_matplotlib_is_told_before_training(monkeypatch):
    monkeypatch.setattr(league, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="a picture needs matplotlib"):
        league.can_draw()
