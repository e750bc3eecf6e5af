"""Does a sparse student, upcycled and distilled, learn more of a teacher than a dense one in the same steps?

Setting: the student is the dense sibling, the teacher the embedded Mixture-of-Experts model, which is better at every
domain. Only feed-forward layers and routers are trained, at 3e-4: before any contestant was run, 60 steps of language
modelling at 1e-3 were found to make the dense model much worse on the calibration split, and at 3e-4 a little.
Contestants of a seed see the same 60 batches of 512 tokens:

- dense+lm, dense+kd: language modelling, or KL from the teacher, for 60 steps;
- moe+lm, moe+kd: the same for 30 steps on the dense model; then layers 0, 2, 4, 6 become 4 copies each, top-2, and go
  on for 30 steps with LM + 0.01 balance, or with KL + LM + 0.01 balance.

Judged by KL(teacher || student) in nats per token and by bits per byte, on 1 KB of each domain's test split. Then the
preference stage: 160 task prompts of the training split, the right answer against one with a character changed; moe+kd
is trained for 20 steps of 8 pairs by DPO with the teacher as reference, and with its own frozen copy as reference.
Judged by how often it finds the right answer of 140 pairs of the test split more probable. Reported; decides nothing.

Rule, written before the first run. `shown` if and only if the 95 % t interval over seeds of dense+kd minus moe+kd in KL
lies above zero, and moe+kd has the lowest mean KL of the four. If moe+kd does not beat dense+kd, the claim is
falsified.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moekit import lab
from moekit.build._dense import feed_forward
from moekit.build._teacher import load_teacher
from moekit.build._upcycle import copies, upcycle
from moekit.build.llava_mod import LlavaMod
from moekit.lab.experiments import Advance, Outcome
from moekit.lab.experiments._building import LENGTH, LM, Ground, gap, means
from moekit.lab.experiments._seeds import each_seed
from moekit.measure import compare, together, windows
from moekit.stream import LoadedModel
from moekit.train import Objective, Preference, TrainOptions, pair_batches, prefer
from moekit.train.preference import Pair, halves, pair_batch

TEACHER, STEPS, RATE, TEST_BYTES = "moekit:mini", 60, 3e-4, 1024
PAIR_STEPS, PAIR_RATE, TRAIN_PAIRS, TEST_PAIRS = 20, 1e-4, 160, 140
STUDENTS = ("dense+lm", "dense+kd", "moe+lm", "moe+kd")
SPARSE = {"lm": Objective(kl=0.0, lm=1.0, balance=0.01), "kd": Objective(kl=1.0, lm=1.0, balance=0.01)}
DENSE = {"lm": LM, "kd": Objective()}


def run(seeds: Sequence[int], text: str | None, advance: Advance) -> Outcome:
    """Return both figures by student, and what preference did. ``text`` is not used."""
    trial = Trial()
    found = each_seed(seeds, advance, lambda seed: trial.measure(seed))
    figures = summary(found)
    sizes = {"test_bytes_per_domain": TEST_BYTES}
    setting = {**trial.ground.setting, **sizes, "teacher": TEACHER, "steps": STEPS, "preference_steps": PAIR_STEPS}
    return Outcome(shown=holds(figures), figures=figures, setting=setting)


def holds(figures: Mapping[str, Any]) -> bool:
    """The rule of the module's docstring."""
    best = min(figures["kl"], key=lambda name: figures["kl"][name]["mean"])
    return bool(figures["gap"]["low"] > 0 and best == "moe+kd")


def summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """``kl`` and ``bits_per_byte`` by student, ``gap``: dense+kd minus moe+kd in KL, ``right_answers`` by reference."""
    kl = [run["kl"] for run in found]
    return {
        "kl": means(kl),
        "gap": gap(kl, "dense+kd", "moe+kd"),
        "bits_per_byte": means([run["bits_per_byte"] for run in found]),
        "right_answers": means([run["right_answers"] for run in found]),
    }


class Trial:
    """Student and teacher in memory."""

    def __init__(self) -> None:
        self.ground = Ground()
        self.teacher = load_teacher(TEACHER, self.ground.dense())

    def measure(self, seed: int) -> dict[str, dict[str, float]]:
        """Every figure of one seed."""
        kl: dict[str, float] = {}
        bits: dict[str, float] = {}
        best: Any = None
        for name in STUDENTS:
            best = self._student(name, seed)
            kl[name], bits[name], bits["teacher"] = self._judge(best, seed)
        return {"kl": kl, "bits_per_byte": bits, "right_answers": self._prefer(best, seed)}

    def _student(self, name: str, seed: int) -> Any:
        """Trained for ``STEPS`` steps in all."""
        kind, loss = name.split("+")
        model, teacher = self.ground.dense(), self.teacher if loss == "kd" else None
        first = STEPS if kind == "dense" else STEPS // 2
        self.ground.fit(model, seed, first, RATE, feed_forward(model), teacher=teacher, objective=DENSE[loss])
        if kind == "dense":
            return model
        method = LlavaMod(teacher=TEACHER)
        model = upcycle(model, method.form(model), copies(method.experts), seed=seed)
        left, what = STEPS - first, feed_forward(model)
        return self.ground.fit(model, seed, left, RATE, what, teacher=teacher, objective=SPARSE[loss], start=first)

    def _judge(self, model: Any, seed: int) -> tuple[float, float, float]:
        """KL from the teacher, and bits per byte of student and teacher, mean over domains."""
        texts = {domain: [lab.text(domain, "test", TEST_BYTES, seed)] for domain in lab.DOMAINS}
        cut = {
            name: windows(lines, self.ground.tokenizer, length=LENGTH, batch_size=8) for name, lines in texts.items()
        }
        found = compare(LoadedModel(self.teacher), LoadedModel(model), together(cut)).domains.values()
        columns = [[one.kl, one.bits_per_byte_b, one.bits_per_byte_a] for one in found]
        kl, student, teacher = (sum(v.mean for v in column if v) / len(column) for column in zip(*columns, strict=True))
        return kl, student, teacher

    def _prefer(self, model: Any, seed: int) -> dict[str, float]:
        """Share of right answers preferred: before, and after DPO with either reference."""
        train, test = pairs("train", TRAIN_PAIRS, seed), pairs("test", TEST_PAIRS, seed)
        found = {"teacher": accuracy(self.teacher, test), "before": accuracy(model, test)}
        options = TrainOptions(steps=PAIR_STEPS, learning_rate=PAIR_RATE, course="cosine", seed=seed)
        for name, reference in (("teacher-as-reference", self.teacher), ("self-as-reference", copy.deepcopy(model))):
            student = copy.deepcopy(model)
            batches = pair_batches(train, 8, seed)
            prefer(student, reference, batches, options, Preference(), what=feed_forward(student))
            found[name] = accuracy(student, test)
        return found


def pairs(split: str, count: int, seed: int) -> list[Pair]:
    """Task prompts with the right answer and one that has a single character changed, in bytes."""
    rng = random.Random(f"pairs/{split}/{seed}")
    made: list[Pair] = []
    each = -(-count // len(lab.TASKS))
    for task in lab.TASKS:
        for prompt, answer in lab.examples(task, split, each, seed):
            place = rng.randrange(len(answer))
            pool = sorted({c for c in answer if c != answer[place]}) or ["0" if answer[place] != "0" else "1"]
            wrong = answer[:place] + rng.choice(pool) + answer[place + 1 :]
            made.append(tuple(list(part.encode()) for part in (prompt, f"{answer}\n", f"{wrong}\n")))  # type: ignore[arg-type]
    rng.shuffle(made)
    return made[:count]


@torch.no_grad()
def accuracy(model: Any, test: Sequence[Pair]) -> float:
    """How often the right answer is the more probable one."""
    model.eval()
    right = 0
    for start in range(0, len(test), 50):
        better, worse = halves(model, pair_batch(test[start : start + 50]))
        right += int((better > worse).sum())
    return right / len(test)
