"""The rules of the experiments on training apart: each condition can fail."""

import pytest

from figures import changed
from moekit.lab.experiments import btm, spes, streaming_diloco
from moekit.lab.experiments._outer_training import DOMAINS, Work, draws

SEEDS = [0.0, 0.001, 0.002]


def by_seed(**losses):
    """Three seeds with a little noise that differs by contestant."""
    return [
        {name.replace("_", " "): loss + noise * (1 + i / 7) for i, (name, loss) in enumerate(losses.items())}
        for noise in SEEDS
    ]


def test_streaming_must_reach_quality_bytes_and_overlap():
    module = streaming_diloco
    losses = {module.DP: 2.0, module.ALONE: 2.4} | dict.fromkeys(module.ROWS, 2.0)
    traffic = {
        name: {"uploaded": 10**6 // (1 + 9 * ("streaming" in name)), "largest": 10**5, "numbers": 10**6}
        for name in module.ROWS
    }
    slow = {
        name: [{"traffic": {"needed": 2.0, "stalled": 1.0, "exchanges": 4}, "seconds": 48.0}] for name in module.WAITING
    }
    slow[module.OURS][0]["traffic"]["stalled"] = 0.1

    def found(**changes):
        return module.summary(by_seed(**{n.replace(" ", "_"): v for n, v in (losses | changes).items()}), traffic, slow)

    good = found()
    assert module.holds(good)
    assert good["emulated_link"][module.OURS]["bound_seconds"] == 0.0
    assert good["emulated_link"][module.PLAIN]["bound_seconds"] == 2.0
    assert not module.holds(found(**{module.OURS: 2.2}))
    assert not module.holds(found(**{module.ALONE: 2.0}))
    for path, value in (
        (("bytes", module.OURS, "share_of_data_parallel"), 0.02),
        (("bytes", module.OURS, "largest_share_of_model"), 0.5),
        (("emulated_link", module.OURS, "waited_seconds"), 1.0),
        (("gap_to_data_parallel", module.OURS, "mean"), 0.06),
    ):
        assert not module.holds(changed(good, path, value))


def test_spes_must_save_and_merging_must_help():
    module = spes
    runs = {
        name: {
            "numbers": 100,
            "experts": 80,
            "trained": 40 if "spes" in name else 100,
            "traffic": {"uploaded": 4 * (40 if "spes" in name else 100) * (module.STEPS // module.EVERY)},
        }
        for name in module.ROWS
    }

    def found(bare=2.2, ours=2.1, whole=2.1):
        names = {module.CENTRAL: 2.0, module.ALL: whole, module.BARE: bare, module.OURS: ours}
        table = [{name: loss + noise for name, loss in names.items()} for noise in SEEDS]
        return {kind: module.summary(table) for kind in module.WORKS} | module.sizes(runs)

    assert module.holds(found())
    assert not module.holds(found(bare=2.1))
    assert not module.holds(found(whole=2.0))
    for path in (("workers", module.OURS, "uploaded"), ("workers", module.OURS, "trained_numbers")):
        assert not module.holds(changed(found(), path, 41))


def test_btm_must_win_over_dense_random_and_scratch():
    names = {
        "dense": 2.2,
        "btm_ensemble": 2.0,
        "random_split_ensemble": 2.1,
        "btm_average": 2.3,
        "from_scratch_average": 9.0,
    }

    def found(**changes):
        return {"inside": btm.summary(by_seed(**(names | changes)))}

    assert btm.holds(found())
    for changes in ({"dense": 2.0}, {"random_split_ensemble": 2.0}, {"from_scratch_average": 2.3}):
        assert not btm.holds(found(**changes))


def test_the_rows_of_all_workers_are_those_of_each():
    work = Work(workers=2, steps=1, tokens=256, own=(("sorting",), ("brackets", "facts")))
    both = work.all_batches(3, (0, 1))(5)
    assert both["input_ids"].shape == (4, 129)
    assert both["input_ids"][:2].equal(work.batches(3, 0)(5)["input_ids"])
    assert both["weight"][2:].equal(work.batches(3, 1)(5)["weight"])
    assert bytes(both["input_ids"][0].tolist()).count(b"sort: ") >= 4
    assert not draws(1, 128, {"facts": 1.0})(0)["input_ids"].equal(draws(1, 128, {"facts": 1.0})(1)["input_ids"])


def test_every_domain_has_one_owner():
    assert sorted(sum(spes.OWN, ())) == sorted(DOMAINS)
    assert pytest.approx(1.0) == sum(btm.EVEN)
