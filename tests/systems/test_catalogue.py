"""The catalogue joins rows, headers and recorded results; nothing in it is kept by hand."""

import json
import shutil

import pytest

from moekit import systems
from moekit.errors import OptionError
from moekit.systems._catalogue import PACKAGE, join, recorded

HEADER = '''"""EASY-EP: keep the experts that matter.

Paper: Domain-Specific Pruning, 2025 (n 17, arXiv 2504.06792).
Method: I[e] = sum_t s_t * g[t, e],
    keep the top M.
Uses: compress._scores
Differs: nothing.
Claim: half the experts suffice.
Shown: lab.experiments.easy_ep

More prose, which is in no field.
"""
'''


@pytest.fixture
def package(tmp_path):
    """A package with the real rows and one method file."""
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "compress").mkdir()
    shutil.copy(PACKAGE / "data" / "systems.csv", tmp_path / "data")
    (tmp_path / "compress" / "easy_ep.py").write_text(HEADER)
    (tmp_path / "compress" / "_part.py").write_text(HEADER)
    return tmp_path


def test_all_rows_are_there():
    rows = systems.records()
    assert [row.n for row in rows] == list(range(1, 183))
    assert len({row.key for row in rows}) == 182
    assert {row.outcome for row in rows} <= set(systems.OUTCOMES)
    assert set(rows[0].as_dict()) >= {"n", "key", "title", "wing", "where", "outcome", "figures"}


def test_without_a_file_a_row_is_planned(package):
    (package / "compress" / "easy_ep.py").unlink()
    rows, others = join(package)
    assert {row.outcome for row in rows} == {"planned"}
    assert others == []


def test_with_a_header_a_row_is_checked(package):
    row = next(row for row in join(package)[0] if row.key == "easy-ep")
    assert (row.outcome, row.where, row.arxiv) == ("checked", "compress/easy_ep.py", "2504.06792")
    assert row.header["Method"] == "I[e] = sum_t s_t * g[t, e], keep the top M."
    assert row.header["Shown"] == "lab.experiments.easy_ep"


@pytest.mark.parametrize("verdict", ["shown", "not-shown"])
def test_a_recorded_result_decides(package, verdict):
    result = {"key": "easy-ep", "verdict": verdict, "figures": {"loss": 0.5}}
    (package / "data" / "results" / "easy-ep.json").write_text(json.dumps(result))
    row = next(row for row in join(package)[0] if row.key == "easy-ep")
    assert (row.outcome, row.figures) == (verdict, {"loss": 0.5})


def test_a_result_does_not_count_when_the_header_names_no_experiment(package):
    result = {"key": "easy-ep", "verdict": "shown", "figures": {"loss": 0.5}}
    (package / "data" / "results" / "easy-ep.json").write_text(json.dumps(result))
    path = package / "compress" / "easy_ep.py"
    path.write_text(HEADER.replace("lab.experiments.easy_ep", "not tried: needs training."))
    row = next(row for row in join(package)[0] if row.key == "easy-ep")
    assert (row.outcome, row.figures) == ("checked", {})


def test_a_method_without_a_row_is_listed_apart(package):
    (package / "compress" / "frequency.py").write_text(HEADER)
    assert [header.where for header in join(package)[1]] == ["compress/frequency.py"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("Claim: half the experts suffice.\n", ""), "Claim: missing or empty"),
        (("Uses: compress._scores", "Uses:"), "Uses: missing or empty"),
        (("Shown: lab.experiments.easy_ep", "Shown: yes"), "Shown: 'yes'"),
        (("Uses: compress._scores\nDiffers: nothing.", "Differs: nothing.\nUses: x"), "fields stand in the order"),
    ],
)
def test_problems_of_a_header_are_named(change, problem):
    assert systems.parse(HEADER, "easy-ep").problems == ()
    faults = systems.parse(HEADER.replace(*change), "easy-ep").problems
    assert any(problem in fault for fault in faults)


def test_a_file_that_is_no_paper_has_no_header():
    assert systems.parse('"""Just a module."""', "x") is None
    assert systems.parse("x = 1", "x") is None


@pytest.mark.parametrize("query", ["easy-ep", "17", " EASY-EP "])
def test_find(query):
    assert systems.find(query).n == 17


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("easy-epp", "did you mean easy-ep"),
        ("sinkhorn", "ssr"),
        ("183", "a number from 1 to 182"),
        ("9999.99999", "arXiv id"),
    ],
)
def test_a_miss_names_the_nearest(query, hint):
    with pytest.raises(OptionError, match="no paper") as caught:
        systems.find(query)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_wing_names_the_wings():
    assert len(systems.records("compress")) == 20
    with pytest.raises(OptionError, match="adapt, compress, fields, route, serve, steer"):
        systems.records("compres")


def test_headers_rows_and_results_agree():
    """A header claims the row its file name gives; an experiment it names exists; a result belongs to a header."""
    for header in systems.headers():
        row = next((row for row in systems.records() if row.key == header.key), None)
        assert header.number == (row.n if row else None), header.where
        if header.experiment:
            assert (PACKAGE / "lab" / "experiments" / f"{header.experiment}.py").is_file(), header.where
    keys = {header.key for header in systems.headers() if header.experiment}
    for path in (PACKAGE / "data" / "results").glob("*.json"):
        result = recorded(path.stem)
        assert path.stem in keys
        assert result["key"] == path.stem
        assert result["verdict"] in ("shown", "not-shown")
        assert result["figures"]
        assert len(result["seeds"]) >= 3


def test_page_shows_every_row_and_the_figures(package):
    result = {
        "key": "easy-ep",
        "verdict": "shown",
        "figures": {"loss": {"mean": 0.51239, "low": 0.5, "high": 1, "n": 3}, "draws": 8},
    }
    (package / "data" / "results" / "easy-ep.json").write_text(json.dumps(result))
    text = systems.page(*join(package))
    assert all(f"| {row.n} | `{row.key}` |" in text for row in systems.records())
    assert "| loss | 0.5124 [0.5, 1] |" in text
    assert "| draws | 8 |" in text
    assert "### easy-ep (shown)" in text
    assert "| shown | 1 |" in text
    assert "| planned | 181 |" in text


@pytest.mark.parametrize("query", ["m-smoe", "2310.01334", "arXiv:2310.01334v2"])
def test_search_finds_what_is_named(query):
    assert [row.key for row in systems.search(query)] == ["m-smoe"]


def test_search_finds_words_of_titles():
    found = systems.search("expert merging")
    assert len(found) > 1
    assert all("merg" in row.title.lower() and "expert" in row.title.lower() for row in found)
    assert {row.n for row in systems.search("Merging EXPERT")} == {row.n for row in found}
    assert [row.n for row in found] == sorted(row.n for row in found)


def test_an_arxiv_id_without_code_says_how_else_to_look():
    with pytest.raises(OptionError, match=r"no paper '1701\.00001' .* known by their arXiv id, the others by title"):
        systems.search("1701.00001")


def test_words_that_no_title_has_name_the_nearest():
    with pytest.raises(OptionError, match=r"no paper 'merging zebras' in the catalogue: did you mean [\w-]+ or"):
        systems.search("merging zebras")
    with pytest.raises(OptionError, match="words of a title"):
        systems.search("xyzzy")
