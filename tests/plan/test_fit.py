"""Fitting a tiny model: budgets kept to the byte, losses measured as the output will lose, errors in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fitting import tiny
from transformers import AutoModelForCausalLM

from moekit.checkpoint import Checkpoint, Writer
from moekit.errors import BudgetError, OptionError, ProfileError
from moekit.plan import LayerPlan, LiveLoss, Plan, StoredExpert, fit, split_held_out
from moekit.plan.candidates import BELIEFS
from moekit.plan.cost import PRECISIONS, WHOLE, expected_error, layer_cost, rounding_errors
from moekit.plan.produce import produce
from moekit.plan.search import STREAMED, TIE, Effort, usual_effort
from moekit.plan.sizes import plan_nbytes, source_nbytes
from moekit.plan.target import make_target
from moekit.profile import profile
from moekit.stream import LoadedModel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    def fill(name: str, weight: torch.nn.Parameter) -> None:
        if "experts" in name or "gate" in name:
            torch.nn.init.normal_(weight, std=0.3)

    path = tmp_path_factory.mktemp("source")
    return tiny(path, fill, hidden_size=64, moe_intermediate_size=64, intermediate_size=64, num_experts=8)


@pytest.fixture(scope="module")
def runner(source: Checkpoint) -> LoadedModel:
    return LoadedModel.load(source)


@pytest.fixture(scope="module")
def seen(source: Checkpoint):
    draw = np.random.default_rng(0)
    texts = {
        d: ["".join(map(chr, draw.integers(low, low + 32, 256))) for _ in range(4)] for d, low in (("a", 64), ("b", 90))
    }
    return profile(source, texts, sequence_length=64, held_out=0.3)


@pytest.fixture(scope="module")
def loss(source: Checkpoint, runner: LoadedModel, seen) -> LiveLoss:
    return LiveLoss(runner, source, [piece for pieces in seen.held_out.values() for piece in pieces])


def plan_of(source: Checkpoint, layer: LayerPlan) -> Plan:
    return Plan(source=source.fingerprint, layers={m.name: layer for m in source.moe_layers})


PLANS = {
    "pruned": LayerPlan.keep([0, 2, 3, 5, 7], 8),
    "rounded": LayerPlan.identity(8).with_bits([2, 3, 4, 8, 16, 2, 2, 4], [32, 64, 128, 64, 64, 64, 32, 32]),
    "merged": LayerPlan.aliased([StoredExpert(((0, 0.5), (1, 0.5))), StoredExpert(((2, 1.0),), 4)], [0, 0, 1, 1] * 2),
}


def write(source: Checkpoint, plan: Plan, path) -> None:
    """The output as apply writes it, without its receipt (which loads the output in a process of its own)."""
    production = produce(source, plan)
    with Writer(path, source=source, job={}) as writer:
        for unit in production.units:
            writer.put(unit.name, unit.tensors)
        writer.seal(production.config)
        writer.publish()


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
def test_what_is_measured_is_what_the_output_does(name, source, runner, loss, seen, tmp_path) -> None:
    """The model in memory under a plan, against the checkpoint that the plan writes, loaded again."""
    plan = plan_of(source, PLANS[name])
    ids = torch.from_numpy(np.asarray(seen.held_out["a"][0]).astype(np.int64))[None]
    before = runner.model(input_ids=ids).logits
    loss.become(plan)
    live = runner.model(input_ids=ids).logits
    loss.restore()
    assert torch.equal(runner.model(input_ids=ids).logits, before)
    write(source, plan, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(live, written, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(live, before, atol=1e-2)
    assert plan_nbytes(plan, source) == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))


def test_the_source_loses_nothing(source, loss) -> None:
    assert loss(Plan(source=source.fingerprint, layers={})) == 0
    assert loss(plan_of(source, LayerPlan.identity(8).with_bits(8))) > 0
    loss.restore()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_budget_is_kept_and_no_rival_does_better(ratio, source, seen, loss) -> None:
    rival = plan_of(source, LayerPlan.keep(range(2), 8).with_bits(2))
    found = fit(source, seen, ratio=ratio, evaluate=loss, rivals={"two at two bits": rival})
    assert found.nbytes == plan_nbytes(found.plan, source) <= source_nbytes(source) * (1 - ratio)
    found.plan.check(source)
    assert found.measured == pytest.approx(loss(found.plan))
    assert found.measured == min(c.measured for c in found.candidates)
    assert {"two at two bits", "all experts at 2 bits in groups of 64"} & {c.name for c in found.candidates}
    assert all(plan_nbytes(c.plan, source) <= found.budget.nbytes for c in found.candidates)
    sizes, losses = zip(*found.curve, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(losses) == sorted(losses, reverse=True)
    text = found.describe()
    assert f"{ratio:.0%} of the bytes removed" in text
    assert "measured" in text
    assert any(line.startswith("Precision:") for line in found.levers)


def test_a_dry_run_needs_headers_and_a_profile_only(source, seen, monkeypatch) -> None:
    monkeypatch.setattr(Checkpoint, "bank", lambda *a, **k: pytest.fail("a dry run read weights"))
    found = fit(source, seen, ratio=0.5, weights=False)
    assert found.measured is None
    assert found.nbytes <= found.budget.nbytes
    assert "nothing was run to calibrate it" in found.describe()


@pytest.mark.parametrize("format", ["stock", "compressed-tensors"])
def test_a_format_that_cannot_say_everything_gets_what_it_can(format, source, seen) -> None:
    found = fit(source, seen, ratio=0.4, format=format, weights=False)
    assert make_target(source, found.plan, format).format == format
    assert found.nbytes == plan_nbytes(found.plan, source, format) <= found.budget.nbytes
    bits = {expert.bits for layer in found.plan.layers.values() for expert in layer.experts}
    assert bits == ({16} if format == "stock" else bits & {4, 8})
    assert len({len(layer.experts) for layer in found.plan.layers.values()}) == 1
    sizes, losses = zip(*found.curve, strict=True)
    assert list(sizes) == sorted(set(sizes))
    assert list(losses) == sorted(set(losses), reverse=True)
    assert min(sizes) <= found.nbytes <= max(sizes)
    best = min(loss for size, loss in found.curve if size <= found.budget.nbytes)
    assert found.predicted == pytest.approx(best)


def test_the_curve_of_a_restricted_format_is_of_real_files(source, seen) -> None:
    """Every point of the stock curve is the size of the plan that keeps so many experts per layer."""
    found = fit(source, seen, size=2 * source_nbytes(source), format="stock", weights=False)
    exact = [plan_nbytes(plan_of(source, LayerPlan.keep(range(n), 8)), source, "stock") for n in range(2, 9)]
    assert [size for size, _ in found.curve] == pytest.approx(exact, abs=16)
    assert found.plan.untouched


def test_a_restricted_format_measures_and_names_its_smallest(source, seen, loss) -> None:
    found = fit(source, seen, ratio=0.6, format="compressed-tensors", evaluate=loss)
    assert found.measured == min(one.measured for one in found.candidates)
    assert {"4", "8"} & {word for one in found.candidates for word in one.name.split()}
    with pytest.raises(BudgetError, match=r"at 16 bits"):
        fit(source, seen, size=20_000, format="stock", weights=False)


def test_memory_counts_the_cache(source, seen) -> None:
    cache = source.summary().kv_bytes(1000)
    assert cache > 0
    total = source_nbytes(source)
    found = fit(source, seen, memory=total, context=1000, weights=False)
    assert found.budget.nbytes == total - cache
    assert found.nbytes <= total - cache
    assert "a context of 1000 tokens" in found.describe()


def test_a_budget_larger_than_the_source_changes_nothing(source, seen) -> None:
    found = fit(source, seen, size=2 * source_nbytes(source), weights=False)
    assert found.plan.untouched
    assert found.predicted == 0


def test_impossible_budgets_name_the_smallest(source, seen) -> None:
    with pytest.raises(BudgetError, match=r"no plan fits .* the smallest possible is about [\d,]+ bytes") as error:
        fit(source, seen, size=20_000, weights=False)
    least = int(str(error.value).split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert fit(source, seen, size=least + 20_000, weights=False).nbytes <= least + 20_000
    with pytest.raises(BudgetError, match="the cache alone is too large"):
        fit(source, seen, memory="1kB", context=1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget"),
        ({"size": 10**6, "ratio": 0.5}, "exactly one budget"),
        ({"ratio": 1.0}, "ratio=1.0 is no share"),
        ({"ratio": -0.1}, "ratio=-0.1 is no share"),
        ({"size": "many"}, "'many' is no amount of memory"),
        ({"size": 10**6, "context": 5}, "counts towards a memory budget"),
        ({"memory": 10**6, "context": 0}, "context=0 must be at least 1"),
    ],
)
def test_wrong_budgets_are_refused(options, message, source, seen) -> None:
    with pytest.raises(OptionError, match=message):
        fit(source, seen, **options)


def test_wrong_profiles_are_refused(source, seen) -> None:
    with pytest.raises(ProfileError, match="is of another model"):
        fit(source, replace(seen, source="0" * 64), ratio=0.5)
    bare = {n: replace(layer, arrays={"counts": layer.counts}) for n, layer in seen.layers.items()}
    with pytest.raises(ProfileError, match="no 'output_energy'"):
        fit(source, replace(seen, layers=bare), ratio=0.5)


def test_costs_are_what_they_say(source, seen) -> None:
    layer = source.moe_layers[0]
    cost = layer_cost(source, layer, seen.layers[layer.name])
    assert 0 < cost.nbytes[WHOLE] - 3 * 64 * 64 * 4 < 400
    assert cost.row_nbytes == 64 * 4
    errors = rounding_errors(source.bank(layer.name), PRECISIONS)
    assert (errors[WHOLE] == 0).all()
    assert (errors[2, 64] > errors[3, 64]).all()
    assert (errors[4, 32] < errors[4, 128]).all()
    for precision in PRECISIONS[1:]:
        assert errors[precision].mean() == pytest.approx(expected_error(*precision), rel=0.6)


def test_held_out_text_is_dealt_without_overlap() -> None:
    pieces = {"a": [np.arange(i, i + 4) for i in range(5)], "b": [np.arange(10)]}
    choose, judge = split_held_out(pieces)
    assert [len(choose["a"]), len(judge["a"])] == [3, 2]
    assert choose["b"][0].tolist() == [0, 1, 2, 3, 4]
    assert judge["b"][0].tolist() == [5, 6, 7, 8, 9]


def test_effort_bounds_what_is_measured(source, seen) -> None:
    asked: list[Plan] = []

    def evaluate(plan: Plan) -> float:
        asked.append(plan)
        return float(len(asked))

    light = fit(source, seen, ratio=0.5, evaluate=evaluate, effort=Effort(1, False, 2, 0))
    assert len(asked) <= 2 + len(BELIEFS) + 2 + 2 + 2
    assert any(plan.layers == light.plan.layers for plan in asked[2:])
    assert light.measured == min(one.measured for one in light.candidates)


@pytest.mark.parametrize(("worse", "preferred"), [(0.5 * TIE, True), (2 * TIE, False)])
def test_of_plans_that_measure_alike_the_calibrated_one_is_taken(worse, preferred, source, seen) -> None:
    def evaluate(plan: Plan) -> float:
        calibrated = any(layer.why == "again" for layer in plan.layers.values())
        return 1e-3 + worse * calibrated

    def finish(plan: Plan) -> Plan:
        return replace(plan, layers={name: replace(layer, why="again") for name, layer in plan.layers.items()})

    found = fit(source, seen, ratio=0.5, evaluate=evaluate, finish={"rounded with calibration": finish})
    assert found.candidates[0].calibrated == preferred
    assert found.candidates[0].name.endswith("rounded with calibration") == preferred
    assert any(one.calibrated for one in found.candidates)
    assert all(one.measured is not None for one in found.candidates)


def test_where_each_measurement_reads_the_disk_few_are_made(source, seen, loss) -> None:
    class Slow:
        reads_disk = True
        asked = 0

        def __call__(self, plan: Plan) -> float:
            Slow.asked += 1
            return loss(plan)

    rival = plan_of(source, LayerPlan.keep(range(2), 8).with_bits(2))
    few = replace(STREAMED, finalists=2)
    found = fit(source, seen, ratio=0.5, evaluate=Slow(), rivals={"two at two bits": rival}, effort=few)
    measured = [one for one in found.candidates if one.measured is not None]
    assert len(measured) == 3 < len(found.candidates)
    assert Slow.asked == len(measured) + 2 * STREAMED.segments
    assert list(found.candidates[: len(measured)]) == sorted(measured, key=lambda one: one.measured)
    assert found.measured == measured[0].measured
    said = f"Measured: 3 of {len(found.candidates)} plans, those of least predicted loss: the model does not fit"
    assert said in found.describe()
    assert usual_effort(source, Slow()) == STREAMED
    loss.restore()


def test_how_far_predictions_can_be_trusted_is_said(source, seen, loss) -> None:
    found = fit(source, seen, ratio=0.5, evaluate=loss)
    ratios = [one.measured / one.predicted for one in found.candidates[1:] if one.predicted > 0]
    assert found.spread == (min(ratios), max(ratios))
    assert f"lost {min(ratios):.2g} to {max(ratios):.2g} times what was predicted" in found.describe()
    assert fit(source, seen, ratio=0.5, weights=False).spread is None


def test_progress_is_told_part_by_part(source, seen, loss) -> None:
    told: list[tuple[str, int, int]] = []
    fit(source, seen, ratio=0.5, evaluate=loss, progress=lambda *step: told.append(step))
    parts = list(dict.fromkeys(what for what, _, _ in told))
    assert parts == ["weighing layers", "trying rankings", "probing layers", "measuring plans"]
    assert all(0 <= done <= total for _, done, total in told)
    assert told[0] == ("weighing layers", 0, 2)
    loss.restore()


def test_a_plan_from_fit_says_how_it_was_made(source, seen, loss, tmp_path) -> None:
    found = fit(source, seen, ratio=0.5, evaluate=loss)
    found.plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["methods"][0].startswith("fit: ")
    assert written["profile"] == seen.fingerprint
    assert Plan.load(tmp_path / "plan.json") == found.plan
