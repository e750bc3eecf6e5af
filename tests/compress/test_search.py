"""Searching plans by measured loss: the archive, the journal and going on after a crash at any measurement."""

from __future__ import annotations

import json

import pytest

from moekit.compress._search import Journal, Search, in_turn, searching
from moekit.errors import OutputError, PlanError
from moekit.plan import LayerPlan, Plan, ranks
from moekit.plan.values import spooling


def express(expert: int) -> Plan:
    return Plan(source="f" * 64, layers={"layer": LayerPlan.keep([expert, 63], 64)})


def kept(plan: Plan) -> int:
    return min(plan.layers["layer"].sources)


def search(evaluate, total: int = 4) -> Search[int]:
    return Search(express, evaluate, about="a search", total=total, points=lambda loss: 100 - loss)


class CrashError(Exception):
    pass


class Meter:
    """Loss is the expert's id; breaks down at measurement ``dies``."""

    def __init__(self, dies: int | None = None, add: float = 0.0) -> None:
        self.dies, self.add, self.asked = dies, add, list[int]()

    def __call__(self, plan: Plan) -> float:
        if len(self.asked) == self.dies:
            raise CrashError
        self.asked.append(kept(plan))
        return kept(plan) + self.add


def test_the_archive_keeps_everything_best_first() -> None:
    found = search(Meter())
    for expert in (9, 2, 30, 4):
        found.try_new(lambda expert=expert: expert)
    assert [one.genome for one in found.archive] == [9, 2, 30, 4]
    assert [one.genome for one in found.ranked()] == [2, 4, 9, 30]
    assert [one.genome for one in found.parents(3.0)] == [2, 4]
    assert [one.genome for one in found.parents(0.5, least=3)] == [2, 4, 9]


def test_what_was_measured_is_drawn_again_and_never_measured_twice() -> None:
    meter, draws = Meter(), iter([5, 5, 5, 6])
    found = search(meter)
    found.try_new(lambda: next(draws))
    assert found.try_new(lambda: next(draws)).genome == 6
    assert found.try_new(lambda: 6).loss == 6.0  # nothing new to be had: it counts, and costs nothing
    assert meter.asked == [5, 6]


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    with searching(lambda done, total: told.append((done, total))):
        found = search(Meter(), total=2)
    for expert in (1, 2):
        found.try_new(lambda expert=expert: expert)
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("dies", [0, 1, 3])
def test_a_journal_goes_on_where_a_crash_was(tmp_path, dies: int) -> None:
    def run(meter: Meter) -> list[float]:
        with spooling(tmp_path):
            found = search(meter)
        return [found.try_new(lambda expert=expert: expert).loss for expert in (9, 2, 30, 4)]

    with pytest.raises(CrashError):
        run(Meter(dies))
    (journal,) = tmp_path.glob("*.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"plan": "torn')
    second = Meter()
    assert run(second) == [9.0, 2.0, 30.0, 4.0]
    # The first plan is measured again, to see that the journal is of the same text; the rest is believed.
    assert second.asked == [9] * (dies > 0) + [9, 2, 30, 4][dies:]
    third = Meter()
    assert run(third) == [9.0, 2.0, 30.0, 4.0]
    assert third.asked == [9]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line.get("loss") for line in lines] == [None, 9.0, 2.0, 30.0, 4.0]


def test_a_journal_of_other_text_is_refused(tmp_path) -> None:
    with spooling(tmp_path):
        search(Meter()).try_new(lambda: 9)
        other = search(Meter(add=0.1))
    with pytest.raises(PlanError, match=r"says a plan costs 9, but here it costs 9.1: it is of other text"):
        other.try_new(lambda: 9)


@pytest.mark.parametrize("loss", ["nan", "-inf"])
def test_a_loss_that_is_no_number_is_refused(loss: str) -> None:
    with pytest.raises(PlanError, match=f"measuring plan 1 of the search gave {loss}, where a number is needed"):
        search(lambda plan: float(loss)).try_new(lambda: 1)


def test_a_plan_that_breaks_the_model_is_merely_worst(tmp_path) -> None:
    with spooling(tmp_path):
        found = search(lambda plan: float("inf") if kept(plan) == 1 else 1.0)
    found.try_new(lambda: 1)
    found.try_new(lambda: 2)
    assert [one.genome for one in found.parents(3.0)] == [2]
    assert Journal(tmp_path, "a search").losses[express(1).fingerprint] == float("inf")


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the journal .*jsonl: "):
        Journal(tmp_path / "file" / "folder", "a search")


def test_other_processes_follow_the_journal_of_the_first(tmp_path, monkeypatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(ranks, "wait", lambda: waits.append(ranks.rank()))

    def run(rank: int, meter: Meter) -> list[float]:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        with spooling(tmp_path), in_turn():
            found = search(meter)
            return [found.try_new(lambda expert=expert: expert).loss for expert in (9, 2)]

    first, second = Meter(), Meter()
    assert run(0, first) == run(1, second) == [9.0, 2.0]
    assert first.asked == [9, 2]
    assert second.asked == []
    assert waits == [0, 1]
    with in_turn():  # without a folder to share, each searches by itself
        pass
    assert waits == [0, 1]
