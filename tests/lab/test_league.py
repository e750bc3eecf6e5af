"""The league: equal compute is counted, leads are seed by seed, the document says what was done."""

import json

import pytest
import torch

from moekit.errors import OptionError
from moekit.lab import league
from moekit.lab.experiments import _league as protocol


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
    assert told == [(done, len(told)) for done in range(2 + 2 * league.ROUNDS)]
    by_name = {row.recipe: row for row in rows}
    assert [row.bits_per_byte.mean for row in rows] == sorted(row.bits_per_byte.mean for row in rows)
    assert by_name["base"].compute == pytest.approx(1)
    assert by_name["base"].lead.mean == 0
    assert by_name["base"].step_time == 1
    assert by_name["wide"].step_time > 0
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


def test_one_seed_is_no_interval(small):
    with pytest.raises(OptionError, match="at least two different seeds"):
        league.standings(league.entrants(["base"]), (1, 1), lambda done, total: None)
