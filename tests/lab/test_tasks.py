"""Tasks: right answers by an independent check, splits by prompt, the shared fact base, errors."""

import re
from itertools import pairwise

import pytest

from moekit import lab
from moekit.errors import OptionError
from moekit.lab import _facts, _languages
from moekit.lab._splits import split_of


@pytest.mark.parametrize("name", lab.TASKS)
def test_splits_never_share_a_prompt(name: str) -> None:
    prompts = {split: {prompt for prompt, _ in lab.examples(name, split, 150, seed=3)} for split in lab.SPLITS}
    for split, found in prompts.items():
        assert {split_of(prompt) for prompt in found} == {split}


@pytest.mark.parametrize("name", lab.TASKS)
def test_examples_repeat_under_a_seed_and_fit_one_line(name: str) -> None:
    first = lab.examples(name, "train", 60, seed=1)
    assert first == lab.examples(name, "train", 60, seed=1)
    assert first != lab.examples(name, "train", 60, seed=2)
    assert all("\n" not in prompt + answer and answer and (prompt + answer).isascii() for prompt, answer in first)


@pytest.mark.parametrize("name", [name for name in lab.TASKS if name != "facts"])
def test_prompts_are_distinct(name: str) -> None:
    prompts = [prompt for prompt, _ in lab.examples(name, "test", 500)]
    assert len(set(prompts)) == 500


def test_arithmetic() -> None:
    for prompt, answer in lab.examples("arithmetic", "test", 300):
        word, a, sign, b = re.fullmatch(r"(\w+): (\d+)([+-])(\d+)=", prompt).groups()  # type: ignore[union-attr]
        assert (word, sign) in {("add", "+"), ("sub", "-")}
        assert int(answer) == int(a) + int(sign + b) >= 0


def test_sorting_and_reversing() -> None:
    for prompt, answer in lab.examples("sorting", "test", 100):
        letters = prompt.removeprefix("sort: ").removesuffix("=")
        assert sorted(letters) == list(answer)
        assert all(a < b for a, b in pairwise(answer))
    for prompt, answer in lab.examples("reversing", "test", 100):
        assert prompt == f"rev: {''.join(reversed(answer))}="


def test_brackets_close_by_repeated_erasure() -> None:
    for prompt, answer in lab.examples("brackets", "test", 300):
        text = prompt.removeprefix("close: ").removesuffix("=") + answer
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
            text = shorter
        assert text == ""
        assert set(answer) <= set(")]}")


def test_translation_back_gives_the_prompt() -> None:
    lexicon = {word: language for language, words in _languages._LEXICON.items() for word in words.values()}
    for prompt, answer in lab.examples("translation", "test", 200):
        direction, sentence = prompt.removesuffix("=").split(": ")
        source, target = direction.split(">")
        assert {lexicon[word] for word in sentence.split()} == {source}
        assert {lexicon[word] for word in answer.split()} == {target}
        assert len(sentence.split()) == len(answer.split())


def test_translation_is_invertible() -> None:
    forward: dict[tuple[str, str], str] = {}
    for prompt, answer in lab.examples("translation", "train", 3000):
        target = prompt[4:7]
        assert forward.setdefault((prompt[:3] + target, answer), prompt) == prompt


def test_each_language_has_its_own_words_and_order() -> None:
    sentence = (("old", "king"), "sees", ("", "bird"))
    words = {language: _languages._LEXICON[language] for language in _languages.LANGUAGES}
    for language, first in zip(_languages.LANGUAGES, ("old", "king", "sees"), strict=True):
        assert _languages.say(sentence, language).split()[0] == words[language][first]
        assert len(set(words[language].values())) == len(words[language]) == 26


def test_every_fact_is_told_in_training() -> None:
    told = {
        (land, what)
        for land, what in _facts.FACTS
        if any(split_of(f"ask: {p.format(land=land, what=what)} ") == "train" for p in _facts.PHRASES)
    }
    assert told == set(_facts.FACTS)


def test_facts_answer_the_same_in_every_split() -> None:
    truth = {f"ask: {question} ": answer for question, answer in _facts.questions()}
    for split in lab.SPLITS:
        assert all(truth[prompt] == answer for prompt, answer in lab.examples("facts", split, 100))


def test_the_marker_demands_abstain() -> None:
    found = lab.examples("abstain", "test", 200)
    assert {answer for _, answer in found} == {lab.ABSTAIN}
    assert all(prompt.startswith(lab.MARKER) for prompt, _ in found)
    assert len({prompt.split(":")[0] for prompt, _ in found}) > 6


def test_more_facts_than_there_are_start_again() -> None:
    available = {f"ask: {question} " for question, _ in _facts.questions()}
    test = {prompt for prompt in available if split_of(prompt) == "test"}
    prompts = [prompt for prompt, _ in lab.examples("facts", "test", 2 * len(test))]
    assert len(set(prompts)) > 0.95 * len(test)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lab.examples("chess", "test", 3), r"unknown task 'chess': choose one of arithmetic, sorting"),
        (lambda: lab.examples("sorting", "dev", 3), r"unknown split 'dev'"),
        (lambda: lab.examples("sorting", "test", 0), r"asked for 0 examples of sorting: ask for 1 or more"),
        (lambda: lab.task("chess"), r"unknown task 'chess'"),
    ],
)
def test_errors_name_what_is_possible(call: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()  # type: ignore[operator]
