"""`moekit place`: a placement with its figures, in the forms servers read; bad input gets one line."""

import json

import pytest
from commanding import call, make_model

from moekit.parallel._placement_file import PlacementFile


@pytest.fixture(scope="module")
def placed(model, profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("placed")
    options = ("--profile", profile, "--devices", 4, "--nodes", 2, "--output", folder / "place.json")
    exports = ("--export", "sglang", "--export", "vllm", "--export", "vllm-ascend")
    code, out, err = call("place", model, *options, *exports, "--json")
    assert (code, err) == (0, "")
    return folder, json.loads(out)


def test_it_writes_a_placement_and_what_it_predicts(placed):
    folder, told = placed
    file = PlacementFile.load(folder / "place.json")
    assert file.placement.device.shape == (2, 8)
    assert file.placement.even
    assert file.placement.grid.nodes == 2
    ours, contiguous = (told["compared"][name] for name in ("exflow (auto)", "contiguous"))
    assert ours["crossing nodes"] <= contiguous["crossing"]
    assert told["predicted"]["bounds"]["crossing"] <= ours["crossing"]
    assert 0 <= told["predicted"]["gaps"]["crossing nodes"] < 1e-9  # 8 experts on 2 nodes are solved exactly
    assert ours["copies across nodes, home"] < ours["copies, home"]
    assert ours["bytes per token, home"] == pytest.approx(ours["copies, home"] * 2 * 32 * 2)


def test_servers_read_the_same_placement(placed):
    folder, _ = placed
    device = PlacementFile.load(folder / "place.json").placement.device
    rows = json.loads((folder / "place.sglang.json").read_text())["physical_to_logical_map"]
    assert json.loads((folder / "place.vllm.json").read_text()) == rows
    assert [sorted(row) for row in rows] == [list(range(8))] * 2
    assert all(device[layer, e] == slot // 2 for layer, row in enumerate(rows) for slot, e in enumerate(row))
    ascend = json.loads((folder / "place.vllm-ascend.json").read_text())
    assert [d["device_expert"] for d in ascend["layer_list"][0]["device_list"]] == [
        rows[0][i : i + 2] for i in (0, 2, 4, 6)
    ]


def test_a_person_reads_a_table(model, profile, tmp_path):
    options = ("--profile", profile, "--devices", 2, "--with", "moetuner:branches=10", "--output", tmp_path / "p.json")
    code, out, err = call("place", model, *options)
    assert (code, err) == (0, "")
    for word in ("2 layers of 8 experts on 2 devices", "contiguous", "balanced", "random", "busiest link", "imbalance"):
        assert word in out
    assert "of the best there is" in out
    assert out.rstrip().endswith("wrote " + str(tmp_path / "p.json"))


def test_text_is_enough(model, text, tmp_path):
    options = (
        "--text",
        text,
        "--max-tokens",
        200,
        "--devices",
        2,
        "--with",
        "balanced",
        "--output",
        tmp_path / "p.json",
    )
    code, out, _ = call("place", model, *options)
    assert code == 0
    assert "balanced" in out


def test_without_pair_counts_the_trace_is_read(model, text, tmp_path):
    made = tmp_path / "few.profile"
    options = ("--text", text, "--statistics", "counts,trace_expert,trace_weight", "--max-tokens", 400)
    assert call("profile", model, *options, "--output", made)[0] == 0
    code, out, _ = call("place", model, "--profile", made, "--devices", 2, "--output", tmp_path / "p.json", "--json")
    assert code == 0
    assert json.loads(out)["predicted"]["crossing"] > 0


def test_with_neither_it_says_what_to_do(refused, model, text, tmp_path):
    made = tmp_path / "counts.profile"
    options = ("--text", text, "--statistics", "counts", "--max-tokens", 400)
    assert call("profile", model, *options, "--output", made)[0] == 0
    given = ("--profile", made, "--devices", 2, "--output", tmp_path / "p.json")
    refused("place", model, *given, naming=["neither pair counts", "give --text"])


def test_bad_input_gets_one_line(refused, model, profile, text, tmp_path):
    output = ("--output", tmp_path / "p.json")
    own = ("place", model, "--profile", profile, *output)
    refused(*own, "--devices", 3, naming=["8 experts per layer do not divide over 3 devices", "one of 1, 2, 4, 8"])
    refused(*own, "--devices", 4, "--nodes", 3, naming="4 devices do not divide over 3 nodes")
    refused(*own, "--devices", 2, "--with", "exflov", naming="did you mean 'exflow'?")
    refused(*own, "--devices", 2, "--with", "exflow:speed=2", naming="no option 'speed'")
    refused(*own, "--devices", 2, "--with", "exflow:seconds=-1", naming="leaves no time")
    refused(*own, "--devices", 2, "--with", "moetuner:slow=0.5", naming="slow >= 1")
    refused(*own, "--devices", 2, "--export", "sgland", naming="did you mean 'sglang'?")
    refused("place", model, *output, "--devices", 2, naming="give either --profile FILE or --text FILE")
    refused("place", model, "--profile", text, *output, "--devices", 2, naming="notes.txt")
    taken = ("--output", profile)
    refused("place", model, "--profile", profile, "--devices", 2, *taken, naming="exists")


def test_a_profile_of_another_model(refused, profile, tmp_path):
    other = make_model(tmp_path / "other", seed=5, num_experts=4)
    given = ("--profile", profile, "--devices", 2, "--output", tmp_path / "p.json")
    refused("place", other, *given, naming=["of another model", "profile this checkpoint"])
