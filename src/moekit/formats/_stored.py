"""What all stored formats share: tensors by flat names, numbers that describe them, and every verb but decoding.

A tensor is named ``N.part.leaf`` (N the stored expert) or ``shared.part.leaf`` (one for the layer), as on disk under
the experts module; biases are ``N.gate_up.bias`` [G] and ``N.down.bias`` [H] in every format. Shapes by suffix:
I intermediate size, H hidden size, G = 2I if gated else I.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..bank import SILU_MUL, Activation, ExpertBank, ExpertWeights
from ..errors import OptionError
from .dense import DenseBank

Spec = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of one stored tensor."""


class StoredBank(ExpertBank):
    """Base of the frozen dataclasses on ``stored``.

    A format names its fields by how a description holds them: ``EACH`` one entry per expert, ``EACH_PART`` a mapping
    from part to one entry per expert (described as ``part_field``), ``WHOLE`` one number for the bank. Every list in
    a description so has one entry per expert. ``PARTS`` are the matrices the format keeps apart.
    """

    FORMAT: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]
    EACH: ClassVar[tuple[str, ...]] = ()
    EACH_PART: ClassVar[tuple[str, ...]] = ()
    WHOLE: ClassVar[tuple[str, ...]] = ()

    stored: Mapping[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype

    @abstractmethod
    def layout(self) -> Iterator[Spec]:
        """Every tensor the fields promise, biases left out. Raises :class:`OptionError` on impossible fields."""

    @abstractmethod
    def _decode(self, expert: int, part: str, dtype: torch.dtype) -> Tensor:
        """One matrix of :attr:`PARTS`, computed in float32 and rounded once."""

    @classmethod
    def allocate(
        cls,
        describe: Mapping[str, Any],
        hidden_size: int,
        intermediate_size: int,
        activation: Activation = SILU_MUL,
        device: torch.device | str | None = None,
    ) -> Self:
        """An uninitialised bank with exactly the tensors that ``describe`` (of :meth:`describe`) says; also on meta.

        Raises :class:`OptionError` where the description is incomplete, impossible, or of another kind of expert.
        """
        gated, bias = describe.get("gated", True), describe.get("bias", False)
        if gated != activation.gated:
            raise OptionError(
                f"the description says gated={gated}, but the activation {activation.name} has gated={activation.gated}"
            )
        shape, dtype = (hidden_size, intermediate_size), getattr(torch, describe.get("dtype", "bfloat16"))
        try:
            fields = cls._fields(describe, gated)
        except KeyError as error:
            raise OptionError(f"the description of {cls.FORMAT} experts lacks {error}") from None
        empty = cls(stored={}, shape=shape, dtype=dtype, activation=activation, **fields)  # type: ignore[call-arg]
        specs = sorted([*empty.layout(), *(empty._biases() if bias else ())], key=_expert_of)
        made = {name: torch.empty(size, dtype=kind, device=device) for name, size, kind in specs}
        return replace(empty, stored=made)  # type: ignore[type-var]

    @classmethod
    def _fields(cls, describe: Mapping[str, Any], gated: bool) -> dict[str, Any]:
        """The format's own fields out of a description."""
        parts = cls._parts(gated)
        fields: dict[str, Any] = {name: describe[name] for name in cls.WHOLE}
        fields |= {name: tuple(describe[name]) for name in cls.EACH}
        fields |= {name: {p: tuple(describe[f"{p}_{name}"]) for p in parts} for name in cls.EACH_PART}
        return fields

    def describe(self) -> dict[str, Any]:
        """What :meth:`allocate` needs besides the sizes, ready for JSON."""
        numbers = {name: getattr(self, name) for name in self.WHOLE}
        numbers |= {name: list(getattr(self, name)) for name in self.EACH}
        numbers |= {f"{p}_{name}": list(getattr(self, name)[p]) for name in self.EACH_PART for p in self.parts}
        dtype = str(self.dtype).removeprefix("torch.")
        kind = {"dtype": dtype, "gated": self.activation.gated, "bias": self.has_bias}
        return {"format": self.FORMAT, **numbers, **kind}

    def checked(self) -> Self:
        """The bank itself, once its tensors are found to be exactly those its fields promise."""
        promised = {name: shape for name, shape, _ in (*self.layout(), *(self._biases() if self.has_bias else ()))}
        given = {name: tuple(tensor.shape) for name, tensor in self.stored.items()}
        for name in sorted(promised.keys() | given.keys()):
            if promised.get(name) != given.get(name):
                raise OptionError(
                    f"{self.FORMAT} experts need {name} of shape {promised.get(name, 'nothing')}, "
                    f"got {given.get(name, 'nothing')}"
                )
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The matrices this bank keeps apart."""
        return self._parts(self.activation.gated)

    @property
    def has_bias(self) -> bool:
        return any(name.endswith(".bias") for name in self.stored)

    @property
    def num_experts(self) -> int:
        if self.EACH:
            return len(getattr(self, self.EACH[0]))
        return len(getattr(self, self.EACH_PART[0])["down"])

    @property
    def hidden_size(self) -> int:
        return self.shape[0]

    @property
    def intermediate_size(self) -> int:
        return self.shape[1]

    def size(self, part: str) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        hidden, inner = self.shape
        rows = 2 * inner if part == "gate_up" and self.activation.gated else inner
        return (hidden, inner) if part == "down" else (rows, hidden)

    def tensors(self) -> Mapping[str, Tensor]:
        return self.stored

    def expert(self, index: int) -> ExpertWeights:
        """One expert, decoded to the dtype the bank was made from."""
        self._check([index])
        bias = (self.stored.get(f"{index}.{part}.bias") for part in ("gate_up", "down"))
        return ExpertWeights(self.matrix(index, "gate_up"), self.matrix(index, "down"), *bias)

    def matrix(self, expert: int, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """One decoded matrix of one expert; ``part`` is "gate_up", "down" or one of :attr:`parts`."""
        dtype = dtype or self.dtype
        if part == "gate_up" and part not in self.PARTS:
            return torch.cat([self._decode(expert, p, dtype) for p in self.parts if p != "down"])
        return self._decode(expert, part, dtype)

    def dequantise(self) -> DenseBank:
        """The same experts as floating-point weights."""
        return DenseBank.stack([self.expert(e) for e in range(self.num_experts)], self.activation)

    def select(self, experts: Sequence[int]) -> Self:
        self._check(experts)
        of_expert: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.stored.items():
            expert, _, rest = name.partition(".")
            of_expert.setdefault(expert, {})[rest] = tensor
        stored = {f"shared.{rest}": t for rest, t in of_expert.get("shared", {}).items()}
        stored |= {f"{new}.{rest}": t for new, old in enumerate(experts) for rest, t in of_expert[str(old)].items()}
        fields: dict[str, Any] = {name: tuple(getattr(self, name)[e] for e in experts) for name in self.EACH}
        for name in self.EACH_PART:
            fields[name] = {p: tuple(values[e] for e in experts) for p, values in getattr(self, name).items()}
        return replace(self, stored=stored, **fields)  # type: ignore[type-var]

    @classmethod
    def _parts(cls, gated: bool) -> tuple[str, ...]:
        return tuple(part for part in cls.PARTS if gated or part != "gate")

    def _biases(self) -> Iterator[Spec]:
        for expert in range(self.num_experts):
            for part in ("gate_up", "down"):
                yield f"{expert}.{part}.bias", (self.size(part)[0],), self.dtype

    def _check(self, experts: Sequence[int]) -> None:
        wrong = [e for e in experts if not 0 <= e < self.num_experts]
        if wrong:
            raise OptionError(f"expert {wrong[0]} does not exist: this bank has experts 0 to {self.num_experts - 1}")


def _expert_of(spec: Spec) -> int:
    """Sorts an expert's tensors together, what is shared first."""
    owner = spec[0].partition(".")[0]
    return -1 if owner == "shared" else int(owner)


def matrices(weights: ExpertWeights, parts: Sequence[str]) -> dict[str, Tensor]:
    """The matrices of a dense expert under the names of ``parts``, gate and up apart where ``parts`` has a gate."""
    up = weights.gate_up.chunk(2) if "gate" in parts else (weights.gate_up,)
    return {part: m.detach() for part, m in zip(parts, (*up, weights.down), strict=True)}


def biases(dense: DenseBank) -> dict[str, Tensor]:
    """The biases of a dense bank by their stored names; empty where it has none."""
    pairs = (("gate_up", dense.gate_up_bias), ("down", dense.down_bias))
    return {
        f"{expert}.{part}.bias": row.detach().clone()
        for part, bias in pairs
        if bias is not None
        for expert, row in enumerate(bias)
    }


def given_biases(biases: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Biases given as "gate_up" and "down" of each expert, by their stored names."""
    return {f"{e}.{part}.bias": given[part] for e, given in enumerate(biases) for part in ("gate_up", "down")}


def each(value: Any, count: int, what: str) -> tuple[Any, ...]:
    """One value for all experts, or a sequence with one each, as one each."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count:
        raise OptionError(f"{what} lists {len(values)} experts, but the bank has {count}: give one number or one each")
    return values


def own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy that keeps nothing else in memory."""
    return tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)


def finite(weight: Tensor, name: str) -> Tensor:
    """The weight, once it is known to hold numbers. Raises :class:`OptionError` on NaN or infinite values."""
    if not torch.isfinite(weight).all():
        raise OptionError(f"expert weights {name} hold NaN or infinite values: they cannot be quantised")
    return weight
