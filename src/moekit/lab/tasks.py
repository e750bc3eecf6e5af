"""Exact tasks made by code: a prompt has one right answer, so that a score needs no judge.

An example is one line, `prompt + answer + newline`; the model stops at the newline. Prompts are split by their hash,
so train, calibration and test never share one. In `facts` the facts are the same in every split by design (they can
only be known by having been told); the phrasings of a fact are what is split.
"""

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moekit.errors import OptionError
from moekit.lab._facts import POOLS, questions
from moekit.lab._languages import ADJECTIVES, LANGUAGES, NOUNS, VERBS, random_sentence, say
from moekit.lab._splits import check_split, split_of

Example = tuple[str, str]

ABSTAIN = "ABSTAIN"
MARKER = "[?] "
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: how an example is drawn, and what blind guessing scores (knowing the form of the answers)."""

    draw: Callable[[random.Random], Example]
    chance: float
    about: str


def _arithmetic(rng: random.Random) -> Example:
    a, b = rng.randrange(100), rng.randrange(100)
    if rng.random() < 0.5:
        return f"add: {a}+{b}=", str(a + b)
    high, low = max(a, b), min(a, b)
    return f"sub: {high}-{low}=", str(high - low)


def _sorting(rng: random.Random) -> Example:
    letters = rng.sample(string.ascii_lowercase, rng.choice((5, 6)))
    return f"sort: {''.join(letters)}=", "".join(sorted(letters))


def _reversing(rng: random.Random) -> Example:
    letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(5, 8)))
    return f"rev: {letters}=", letters[::-1]


def _brackets(rng: random.Random) -> Example:
    """Open, close, end with one to five brackets open; the answer closes them."""
    text, stack = "", ""
    for _ in range(rng.randint(4, 12)):
        if stack and (len(stack) == 5 or rng.random() < 0.45):
            text, stack = text + stack[-1], stack[:-1]
        else:
            opening = rng.choice("([{")
            text, stack = text + opening, stack + _PAIRS[opening]
    if not stack:
        text, stack = text + "(", ")"
    return f"close: {text}=", stack[::-1]


def _translation(rng: random.Random) -> Example:
    source, target = rng.sample(LANGUAGES, 2)
    sentence = random_sentence(rng)
    return f"{source}>{target}: {say(sentence, source)}=", say(sentence, target)


_QUESTIONS = questions()


def _facts(rng: random.Random) -> Example:
    question, answer = rng.choice(_QUESTIONS)
    return f"ask: {question} ", answer


def _abstain(rng: random.Random) -> Example:
    """Any other task's prompt behind a marker; the only right answer is ABSTAIN."""
    draw = rng.choice((_arithmetic, _sorting, _reversing, _brackets, _translation, _facts))
    return MARKER + draw(rng)[0], ABSTAIN


_SENTENCES = len(NOUNS) * (len(NOUNS) - 1) * len(VERBS) * len(ADJECTIVES) ** 2

_TASKS = {
    "arithmetic": Task(draw=_arithmetic, chance=1 / 100, about="sum or difference of two numbers below 100"),
    "sorting": Task(draw=_sorting, chance=1 / 240, about="5 or 6 different letters in order (1 / mean of 5!, 6!)"),
    "reversing": Task(draw=_reversing, chance=1 / 26**5, about="5 to 8 letters backwards"),
    "brackets": Task(draw=_brackets, chance=1 / 9, about="close what is open, three kinds (1 / 3^2 at mean depth)"),
    "translation": Task(draw=_translation, chance=1 / _SENTENCES, about="one of three invented languages to another"),
    "facts": Task(draw=_facts, chance=1 / len(POOLS["metal"]), about="a fact asked in a phrasing never seen for it"),
    "abstain": Task(draw=_abstain, chance=0.0, about=f"any prompt behind a marker: the answer is {ABSTAIN}"),
}
TASKS: tuple[str, ...] = tuple(_TASKS)


def task(name: str) -> Task:
    """Return a task by name; raises OptionError for an unknown one."""
    if name not in _TASKS:
        raise OptionError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return _TASKS[name]


def stream(name: str, split: str, seed: int) -> Iterator[Example]:
    """Yield examples of one task and split without end; a prompt returns only once they seem used up.

    That is after 2000 draws in a row without a new one, which in practice concerns only `facts`.
    """
    check_split(split)
    draw = task(name).draw
    rng = random.Random(f"{name}/{split}/{seed}")
    seen: set[str] = set()
    misses = 0
    while True:
        prompt, answer = draw(rng)
        if prompt in seen or split_of(prompt) != split:
            misses += 1
            if misses == 2000:
                seen, misses = set(), 0
            continue
        seen.add(prompt)
        misses = 0
        yield prompt, answer


def examples(name: str, split: str, n: int, seed: int = 0) -> list[Example]:
    """Return n (prompt, answer) pairs of a task, of one split, drawn from `seed`.

    Raises OptionError for an unknown task or split or n < 1.
    """
    if n < 1:
        raise OptionError(f"asked for {n} examples of {name}: ask for 1 or more")
    source = stream(name, split, seed)
    return [next(source) for _ in range(n)]
