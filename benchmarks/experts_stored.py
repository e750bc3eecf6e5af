"""The stored formats that experts.py compares, of the experts of a plain module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moekit.formats import DenseBank, NestedBank, PackedBank, TernaryBank
from moekit.kernels import BankExperts

DISTINCT = 4
"""Experts of a layer that are drawn; the others are copies, each in memory of its own (drawing all takes minutes)."""

PACKED = {"packed 8 bit": (8,) * 4, "packed 4 bit": (4,) * 4, "packed 3 bit": (3,) * 4, "packed 2 bit": (2,) * 4}
PACKED |= {"packed 1 bit": (1,) * 4, "packed 1-8 bit": (1, 2, 4, 8)}
"""Bits of the distinct experts."""
NESTED = {f"nested {bits} bit": bits for bits in (2, 3, 4, 8)}
"""Bits at which a base of 2 is read."""
STORED = (*PACKED, *NESTED, "ternary")


def stored(module: Any, name: str) -> BankExperts:
    """The distinct experts in a stored format, groups of 64, and copied to the places of all others."""
    few, experts = DISTINCT, module.num_experts
    dense = DenseBank(module.gate_up_proj[:few].detach(), module.down_proj[:few].detach())
    bank: Any
    if name in PACKED:
        bank = PackedBank.quantise(dense, PACKED[name], 64)
    elif name in NESTED:
        bank = NestedBank.quantise(dense, NESTED[name], 2, 64)
    else:
        bank = TernaryBank.quantise(dense)
    by_expert = [{n: t for n, t in bank.tensors().items() if n.startswith(f"{e}.")} for e in range(few)]
    copies = {f"{e}.{n.split('.', 1)[1]}": t.clone() for e in range(experts) for n, t in by_expert[e % few].items()}
    places = [e % few for e in range(experts)]
    fields = {name: tuple(getattr(bank, name)[place] for place in places) for name in bank.EACH}
    for name in bank.EACH_PART:
        fields[name] = {part: tuple(of[place] for place in places) for part, of in getattr(bank, name).items()}
    return BankExperts(replace(bank, stored=copies, **fields))
