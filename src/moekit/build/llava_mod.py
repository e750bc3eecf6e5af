"""LLaVA-MoD: a small dense model becomes a sparse one that learns from a teacher, then from its preferences.

Paper: LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation, 2024 (n 56, arXiv 2408.15881).
Method: FFNs of layers 0, 2, 4.. become E exact copies with a random top-k router (weights sum to 1: nothing changes);
    dense to dense: KL(teacher || student); dense to sparse: KL + LM + 0.01 * balance; then sigmoid DPO or KTO on pairs
    with the teacher as reference.
Uses: build._upcycle, checkpoint.upcycle, train.distil, train.preference
Differs: text only (no vision tower, no projector stage); no capacity limit; masks are shifted in every loss; every
    stage has its own number of steps in place of epochs. The released code's default preference loss is kto_pair.
Claim: 2B active parameters beat a 7B model by 8.8 % with 0.3 % of its data; beats its teacher on hallucination.
Shown: lab.experiments.llava_mod. Not here: after 60 steps of 512 tokens distillation beats plain text for both
    students, but the dense one is nearer to the teacher (KL 0.318 against 0.322; difference -0.004, -0.007 to -0.002):
    30 sparse steps hardly tell copies apart. 20 steps of DPO help with neither reference (0.924 to 0.919 right).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moekit.build._builder import Builder, Built, Material, check
from moekit.build._dense import dense_layers, feed_forward
from moekit.build._teacher import load_teacher
from moekit.build._upcycle import check_equal, copies, probe_rows, upcycle
from moekit.checkpoint.upcycle import MoEForm
from moekit.errors import TextError
from moekit.train import Objective, Preference, TrainOptions, batches_of, distil, pair_batches, prefer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.train import Record


@dataclass(frozen=True, kw_only=True)
class LlavaMod(Builder):
    """``teacher`` is a checkpoint, or "self" for the dense model as it was. ``every`` 2: layers 0, 2, 4..

    ``dense_steps``, ``sparse_steps`` and ``preference_steps`` are the three stages; 0 leaves one out.
    """

    teacher: str = "self"
    experts: int = 4
    top_k: int = 2
    every: int = 2
    dense_steps: int = 100
    sparse_steps: int = 100
    preference_steps: int = 0
    learning_rate: float = 2e-5
    preference_rate: float = 2e-6
    lm: float = 1.0
    balance: float = 0.01
    preference: Literal["dpo", "kto_pair"] = "dpo"
    beta: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check(1 <= self.top_k <= self.experts, f"top_k={self.top_k} of {self.experts} experts is not possible")
        check(self.every >= 1, f"every={self.every}: give 1 for all layers, 2 for every other")
        stages = (self.dense_steps, self.sparse_steps, self.preference_steps)
        check(min(stages) >= 0, f"steps {stages} cannot be negative: 0 leaves a stage out")

    def build(self, model: PreTrainedModel, material: Material) -> Built:
        """Dense to dense, upcycle, dense to sparse, preference. TextError without text or, for the last, pairs."""
        if self.preference_steps and not material.pairs:
            raise TextError("preference_steps needs pairs of answers: give --pairs FILE, or preference_steps=0")
        report: dict[str, object] = {}
        teacher = load_teacher(self.teacher, model)
        if self.dense_steps:
            report["dense"] = self._distil(model, teacher, material, self.dense_steps, Objective()).last()
        student = upcycle(model, self.form(model), copies(self.experts), seed=self.seed)
        report["difference_after_upcycling"] = check_equal(model, student, probe_rows(model))
        report["layers"] = list(self.form(model).layers)
        if self.sparse_steps:
            objective = Objective(lm=self.lm, balance=self.balance)
            report["sparse"] = self._distil(student, teacher, material, self.sparse_steps, objective).last()
        if self.preference_steps:
            report["preference"] = self._prefer(student, teacher, material).last()
        return Built(student, report)

    def form(self, model: PreTrainedModel) -> MoEForm:
        """What a dense model shall become: experts in every so many-th layer, weights that sum to 1."""
        layers = dense_layers(model)
        return MoEForm(
            layers=tuple(ffn.layer for ffn in layers[:: self.every]),
            num_experts=self.experts,
            top_k=self.top_k,
            intermediate_size=layers[0].intermediate_size,
        )

    def _options(self, steps: int) -> TrainOptions:
        return TrainOptions(steps=steps, learning_rate=self.learning_rate, course="cosine", warmup=0.03, seed=self.seed)

    def _distil(
        self, student: PreTrainedModel, teacher: PreTrainedModel, material: Material, steps: int, objective: Objective
    ) -> Record:
        batches = batches_of(material.need_rows(self.name), material.batch_size, self.seed)
        what = feed_forward(student)
        return distil(student, teacher, batches, self._options(steps), objective, what=what, progress=material.progress)

    def _prefer(self, student: PreTrainedModel, teacher: PreTrainedModel, material: Material) -> Record:
        options = replace(self._options(self.preference_steps), learning_rate=self.preference_rate)
        return prefer(
            student,
            teacher,
            pair_batches(material.pairs, material.batch_size, self.seed),
            options,
            Preference(kind=self.preference, beta=self.beta, balance=self.balance),
            what=feed_forward(student),
            progress=material.progress,
        )
