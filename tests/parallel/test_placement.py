"""Placements, what they move (against a count by hand, token by token), their files and exports."""

import json

import numpy as np
import pytest

from moekit.errors import OptionError, OutputError, PlanError, ProfileError
from moekit.parallel import _placement_export
from moekit.parallel._links import Grid
from moekit.parallel._placement_file import PlacementFile
from moekit.parallel._traffic import Flow, imbalance, movement
from moekit.parallel.placement import Placement, check_grid, placer, placers
from moekit.profile import RoutingTrace


def trace_of(expert, weight=None, sequence=None, num_experts=4):
    expert = np.asarray(expert, np.int32)
    tokens, layers, _ = expert.shape
    return RoutingTrace(
        expert=expert,
        weight=np.asarray(weight if weight is not None else np.where(expert >= 0, 0.5, 0), np.float32),
        sequence=np.asarray(sequence if sequence is not None else np.zeros(tokens), int),
        step=np.zeros(tokens, int),
        decode=np.zeros(tokens, bool),
        num_experts=(num_experts,) * layers,
        domain=np.zeros(tokens, int),
    )


def random_trace(tokens=40, layers=3, experts=8, slots=3, seed=0):
    rng = np.random.default_rng(seed)
    expert = np.stack([[rng.permutation(experts)[:slots] for _ in range(layers)] for _ in range(tokens)])
    expert[rng.random(expert.shape) < 0.1] = -1
    return trace_of(expert, rng.random(expert.shape), rng.integers(0, 9, tokens), experts)


def by_hand(placement, trace, dataflow):
    """Rows and copies, one token after the other."""
    devices = placement.devices
    rows, sent = np.zeros((trace.num_layers, devices)), np.zeros((trace.num_layers, devices, devices))
    for token in range(len(trace)):
        home = at = int(trace.sequence[token]) % devices
        for layer in range(trace.num_layers):
            both = zip(trace.expert[token, layer], trace.weight[token, layer], strict=True)
            used = [(w, int(e)) for e, w in both if e >= 0]
            keep = [int(placement.device[layer, e]) for _, e in used]
            for device in keep:
                rows[layer, device] += 1
            start = home if dataflow == "home" else at
            if dataflow == "follow" and used:
                at = keep[int(np.argmax([w for w, _ in used]))]
            end = home if dataflow == "home" else at
            for device in set(keep):
                sent[layer, start, device] += device != start
                sent[layer, device, end] += device != end
    return rows, sent


@pytest.mark.parametrize("dataflow", ["home", "follow"])
@pytest.mark.parametrize("seed", range(3))
def test_movement_is_the_count_by_hand(dataflow, seed):
    trace = random_trace(seed=seed)
    rng = np.random.default_rng(seed)
    placement = Placement(np.stack([rng.permutation(8) // 2 for _ in range(3)]), Grid.of(4, 2))
    found = movement(placement, trace, dataflow)
    rows, sent = by_hand(placement, trace, dataflow)
    assert np.array_equal(found.rows, rows)
    assert np.array_equal(found.sent, sent)
    assert found.copies == pytest.approx(sent.sum() / (len(trace) * 3))
    across = sent[:, :2, 2:].sum() + sent[:, 2:, :2].sum()
    assert found.across == pytest.approx(across / (len(trace) * 3))
    assert found.busiest_link == pytest.approx(sent.max((1, 2)).mean() / len(trace))


def test_following_costs_nothing_where_experts_of_a_token_are_together():
    """Two sequences that keep to their own experts; contiguous placement parts them, affinity does not."""
    expert = np.array([[[0], [2], [1]], [[3], [1], [2]]] * 3)
    trace = trace_of(expert, sequence=[0, 1] * 3)
    device = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    together = Placement(device, Grid.of(2))
    assert movement(together, trace, "follow").copies == 0
    assert movement(together, trace, "home").copies == 0
    flow = Flow.of_trace(trace)
    assert flow.crossing(device) == 0
    apart = placer("contiguous").place(flow, Grid.of(2)).placement
    assert flow.crossing(apart.device) == 1
    assert movement(apart, trace, "follow").copies == pytest.approx(2 / 3)
    assert placer("exflow").place(flow, Grid.of(2)).value["crossing"] == 0


def test_flow_counts_pairs_of_slots():
    trace = trace_of([[[0, 1], [2, -1]], [[0, 3], [2, 3]]])
    flow = Flow.of_trace(trace)
    assert flow.counts.tolist() == [[2, 1, 0, 1], [0, 0, 2, 1]]
    assert flow.total == 2 + 4
    assert flow.pairs[0, 0].tolist() == [0, 0, 2, 1]
    assert flow.rows(np.array([[0, 0, 1, 1]] * 2), 2).tolist() == [[3, 1], [0, 3]]
    assert imbalance(np.array([[3.0, 1.0], [2.0, 2.0]])) == pytest.approx(1.25)


def test_random_placement_keeps_what_chance_keeps():
    flow = Flow.of_trace(random_trace(tokens=3000))
    found = [placer(f"random:seed={seed}").place(flow, Grid.of(4)).value["crossing"] for seed in range(20)]
    assert np.mean(found) == pytest.approx(0.75, abs=0.01)
    assert found[0] == placer("random:seed=0").place(flow, Grid.of(4)).value["crossing"]


def test_a_layer_as_the_engine_takes_it():
    placement = Placement(np.array([[0, 1, 1, 0], [1, 1, 0, 1]]), Grid.of(2))
    assert placement.layout(0).owner == (0, 1, 1, 0)
    assert placement.layout(1).own(0) == [2]
    assert placement.sizes.tolist() == [[2, 2], [1, 3]]
    assert not placement.even


def test_bad_placements_and_grids():
    with pytest.raises(PlanError, match="2 devices names device 2: 0 to 1 are"):
        Placement(np.array([[0, 2]]), Grid.of(2))
    with pytest.raises(PlanError, match="1 of 3 devices keep no expert"):
        Placement(np.array([[0, 2]]), Grid.of(3))
    with pytest.raises(PlanError, match=r"layers by experts, found the shape \(2,\)"):
        Placement(np.array([0, 1]), Grid.of(2))
    with pytest.raises(OptionError, match="16 experts per layer do not divide over 3 devices: choose one of 1, 2, 4"):
        check_grid(16, 3)
    with pytest.raises(OptionError, match="3 devices do not divide over 2 nodes"):
        check_grid(16, 3, 2)
    with pytest.raises(OptionError, match="unknown placer 'exflo'; did you mean 'exflow'"):
        placer("exflo")
    with pytest.raises(PlanError, match="for 1 layers of 4 experts, the trace has 3 of 8"):
        movement(Placement(np.array([[0, 0, 1, 1]]), Grid.of(2)), random_trace(), "home")
    uneven = trace_of([[[0], [1]]])
    object.__setattr__(uneven, "num_experts", (4, 3))
    with pytest.raises(PlanError, match="from 3 to 4 experts"):
        Flow.of_trace(uneven)


def test_all_placers_are_found():
    assert {"contiguous", "random", "balanced", "exflow", "moetuner"} <= set(placers())
    assert "llep" not in placers()


class FakeLayer:
    def __init__(self, arrays, num_experts=4):
        self.arrays, self.num_experts, self.array = arrays, num_experts, arrays.__getitem__

    def total(self, name):
        return self.arrays[name].sum((0, 1, 2))


class FakeProfile:
    trace = ()

    def __init__(self, *layers):
        self.layers = dict(enumerate(layers))


def test_flow_of_a_profile():
    counts, pairs = np.ones((2, 1, 2, 4)), np.full((4, 4), 3.0)
    flow = Flow.of_profile(
        FakeProfile(FakeLayer({"counts": counts}), FakeLayer({"counts": counts, "transition": pairs}))
    )
    assert flow.total == 48
    assert flow.counts[0].tolist() == [4] * 4
    alone = Flow.of_profile(FakeProfile(FakeLayer({"counts": counts})))
    assert alone.pairs.shape == (0, 4, 4)
    with pytest.raises(ProfileError, match=r"neither pair counts .* nor a trace: run `moekit profile` again"):
        Flow.of_profile(FakeProfile(FakeLayer({"counts": counts}), FakeLayer({"counts": counts})))


@pytest.fixture
def file():
    placement = Placement(np.array([[0, 1, 1, 0], [1, 0, 0, 1]]), Grid.of(2))
    return PlacementFile(
        placement, "f" * 64, "tiny", "exflow", (("model.layers.1.mlp", 1), ("model.layers.3.mlp", 3)), 4
    )


def test_a_file_round_trips(file, tmp_path):
    path = tmp_path / "place.json"
    file.save(path)
    again = PlacementFile.load(path)
    assert again.as_dict() == file.as_dict()
    assert np.array_equal(again.placement.device, file.placement.device)
    with pytest.raises(OutputError, match="exists"):
        file.save(path)
    data = json.loads(path.read_text())
    data["layers"][0]["experts"] = [[0, 1], [1, 2]]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp does not keep every expert once"):
        PlacementFile.load(path)
    path.write_text("[]")
    with pytest.raises(PlanError, match="no placement of version 1"):
        PlacementFile.load(path)
    path.write_text("{")
    with pytest.raises(PlanError, match="cannot be read"):
        PlacementFile.load(path)
    with pytest.raises(OutputError, match="cannot be written"):
        file.save(tmp_path / "no" / "place.json")


def test_exports_are_what_servers_read(file):
    """Structure only: a permutation of the logical experts per decoder layer, slots of a device together."""
    rows = _placement_export.export(file, "sglang")["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 3], [0, 3, 1, 2], [0, 1, 2, 3], [1, 2, 0, 3]]
    for index, row in enumerate((rows[1], rows[3])):
        for slot, expert in enumerate(row):
            assert file.placement.device[index, expert] == slot // 2
    assert _placement_export.export(file, "vllm") == [rows[1], rows[3]]
    ascend = _placement_export.export(file, "vllm-ascend")
    assert ascend["moe_layer_count"] == len(ascend["layer_list"]) == 2
    table = [[device["device_expert"] for device in layer["device_list"]] for layer in ascend["layer_list"]]
    assert np.array(table).shape == (2, 2, 2)
    assert table[0] == [[0, 3], [1, 2]]
    assert all(layer["device_count"] == 2 for layer in ascend["layer_list"])


def test_uneven_placements_are_not_exported(file):
    uneven = Placement(np.array([[0, 1, 1, 1], [1, 0, 0, 0]]), Grid.of(2))
    other = PlacementFile(uneven, "f", "tiny", "moetuner", file.layers, 4)
    for form in _placement_export.EXPORTS:
        with pytest.raises(PlanError, match=f"{form} wants the same number .* has 1 to 3: place with exflow"):
            _placement_export.export(other, form)
