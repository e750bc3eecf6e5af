"""How each family stores its experts, read into and written back from the canonical orientation of a bank.

Shapes by suffix: E experts, I intermediate size, H hidden size, G = 2I if gated else I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import moe as _stock

from ..bank import SILU_MUL, Activation, ExpertBank
from ..errors import PlanError, UnsupportedModelError
from ..formats import DenseBank


class Layout:
    """One storage scheme over a live module: :meth:`read` gives canonical tensors, :meth:`write` puts them back.

    The canonical tensors are views of the parameters where the scheme allows it, else copies.
    """

    gated = True
    interleaved = False
    attention = False
    """True for experts on attention, between whose two matrices attention runs."""
    weights_on_input = False
    """True where the combine weight multiplies what an expert reads, not what it returns."""

    def __init__(self, module: nn.Module, num_experts: int) -> None:
        self.module: Any = module
        self.num_experts = num_experts

    def read(self) -> dict[str, Tensor | None]:
        """``gate_up`` [E, G, H], ``down`` [E, H, I], ``gate_up_bias`` [E, G] and ``down_bias`` [E, H] or None."""
        raise NotImplementedError

    def write(self, bank: DenseBank) -> None:
        """Copy a bank of the same shapes into the parameters."""
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        down = self.read()["down"]
        assert down is not None
        return down.shape[1]

    def activation(self) -> Activation:
        return _activation(self.module, self.gated, self.interleaved)

    def finish(self, slots: Tensor) -> Tensor:
        """What the family does to an expert's output before weighting it (a post-expert norm), else nothing."""
        return self.module.post_expert_norm(slots) if getattr(self.module, "has_post_expert_norm", False) else slots

    def stored(self, expert: Tensor) -> Tensor:
        """Router ids to the bank's experts (PAD stays PAD)."""
        return expert

    def bank(self) -> ExpertBank:
        tensors = self.read()
        down = tensors["down"]
        if down is not None and down.dtype.itemsize < 2:
            dtype = str(down.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"{type(self.module).__name__} holds its experts as {dtype} with scales "
                "beside them: load the model dequantised (quantization_config with dequantize=True)"
            )
        return DenseBank(**tensors, activation=self.activation())

    def put(self, bank: ExpertBank) -> None:
        dense = (
            bank if isinstance(bank, DenseBank) else DenseBank.stack([bank.expert(e) for e in range(bank.num_experts)])
        )
        for name, mine in self.read().items():
            theirs = getattr(dense, name)
            if (mine is None) != (theirs is None) or (mine is not None and mine.shape != theirs.shape):
                found = None if theirs is None else list(theirs.shape)
                raise PlanError(
                    f"the bank's {name} is {found}, but this block holds {None if mine is None else list(mine.shape)}: "
                    "put back a bank of the same shapes"
                )
        with torch.no_grad():
            self.write(dense)


class Packed(Layout):
    """moekit's packed experts: the module has a bank of its own, which router ids reach through its slots."""

    @property
    def hidden_size(self) -> int:
        return self.module.hidden_dim

    def stored(self, expert: Tensor) -> Tensor:
        if self.module.slots is None:
            return expert
        table = torch.tensor([*self.module.slots, -1], device=expert.device)
        return table[expert]  # PAD is -1, the last entry

    def bank(self) -> ExpertBank:
        return self.module.bank

    def put(self, bank: ExpertBank) -> None:
        raise PlanError(
            "packed experts cannot be written to: load the model they were packed from, edit that, pack anew"
        )


class Stacked(Layout):
    """Stacked parameters as transformers' shared experts contract has them, with its deviations read off the module."""

    def __init__(self, module: nn.Module, num_experts: int, *, transposed: bool | None = None) -> None:
        super().__init__(module, num_experts)
        self.gated = getattr(module, "has_gate", hasattr(module, "gate_up_proj"))
        self.interleaved = self.gated and not getattr(module, "is_concatenated", True)
        self.transposed = getattr(module, "is_transposed", False) if transposed is None else transposed
        self.up_name = "gate_up_proj" if self.gated else "up_proj"

    def _rows(self, tensor: Tensor, to_canonical: bool) -> Tensor:
        """Interleaved gate and up rows <-> gate rows first, along axis 1."""
        if not self.interleaved:
            return tensor
        if to_canonical:
            return torch.cat([tensor[:, ::2], tensor[:, 1::2]], dim=1)
        gate, up = tensor.chunk(2, dim=1)
        return torch.stack([gate, up], dim=2).flatten(1, 2)

    def _turn(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if self.transposed else tensor

    def _bias(self, name: str) -> Tensor | None:
        return getattr(self.module, name + "_bias", None)

    def read(self) -> dict[str, Tensor | None]:
        up_bias, down_bias = self._bias(self.up_name), self._bias("down_proj")
        up, down = getattr(self.module, self.up_name), self.module.down_proj
        return {
            "gate_up": self._rows(self._turn(up[: self.num_experts]), True),
            "down": self._turn(down[: self.num_experts]),
            "gate_up_bias": None if up_bias is None else self._rows(up_bias[: self.num_experts], True),
            "down_bias": None if down_bias is None else down_bias[: self.num_experts],
        }

    def oriented(self, bank: DenseBank) -> dict[str, Tensor]:
        """A bank's tensors by the names of the parameters that hold them, turned as those are."""
        values = {
            self.up_name: self._turn(self._rows(bank.gate_up, False)),
            "down_proj": self._turn(bank.down),
            f"{self.up_name}_bias": None if bank.gate_up_bias is None else self._rows(bank.gate_up_bias, False),
            "down_proj_bias": bank.down_bias,
        }
        return {name: value for name, value in values.items() if value is not None}

    def write(self, bank: DenseBank) -> None:
        for name, value in self.oriented(bank).items():
            if (parameter := getattr(self.module, name, None)) is not None:
                parameter[: self.num_experts].copy_(value)


class TransposedOnInput(Stacked):
    """Llama 4: undecorated [E, H, 2I] and [E, I, H], every expert reads its input multiplied by the router's score."""

    weights_on_input = True

    def __init__(self, module: nn.Module, num_experts: int) -> None:
        super().__init__(module, num_experts, transposed=True)


class Flattened(Layout):
    """DBRX: ``w1``, ``v1``, ``w2`` each [E * I, H]; w1 is the gate, v1 the up, w2 the transposed down projection."""

    def _split(self, name: str) -> Tensor:
        weight = getattr(self.module.mlp, name)
        return weight.view(self.num_experts, -1, weight.shape[-1])

    def read(self) -> dict[str, Tensor | None]:
        gate_up = torch.cat([self._split("w1"), self._split("v1")], dim=1)
        return {"gate_up": gate_up, "down": self._split("w2").transpose(1, 2), "gate_up_bias": None, "down_bias": None}

    def write(self, bank: DenseBank) -> None:
        gate, up = bank.gate_up.chunk(2, dim=1)
        for name, value in (("w1", gate), ("v1", up), ("w2", bank.down.transpose(1, 2))):
            self._split(name).copy_(value)

    def activation(self) -> Activation:
        return _gated(self.module.mlp.activation_fn)


class Pair(Layout):
    """JetMoE: two stacked linear modules, ``input_linear`` [E, 2I, H] and ``output_linear`` [E, H, I]."""

    def read(self) -> dict[str, Tensor | None]:
        weights = self.module.input_linear.weight, self.module.output_linear.weight
        return {"gate_up": weights[0], "down": weights[1], "gate_up_bias": None, "down_bias": None}

    def write(self, bank: DenseBank) -> None:
        self.module.input_linear.weight.copy_(bank.gate_up)
        self.module.output_linear.weight.copy_(bank.down)

    def activation(self) -> Activation:
        return _gated(self.module.activation)


class AttentionPair(Pair):
    """JetMoE's mixture of attention: attention runs between the two products, so the experts are no bank."""

    attention = True

    def bank(self) -> ExpertBank:
        raise UnsupportedModelError(
            f"{type(self.module).__name__} holds attention experts: attention runs between their two matrices, so they "
            "are no feed-forward bank; only masking and removal work on them"
        )


class Modules(Layout):
    """Switch: one dense module per expert with linear layers ``wi`` and ``wo``, no gate."""

    gated = False

    def _linear(self, name: str) -> list[Tensor]:
        return [getattr(expert, name).weight for expert in self.module.values()]

    def read(self) -> dict[str, Tensor | None]:
        up, down = torch.stack(self._linear("wi")), torch.stack(self._linear("wo"))
        return {"gate_up": up, "down": down, "gate_up_bias": None, "down_bias": None}

    def write(self, bank: DenseBank) -> None:
        for name, stacked in (("wi", bank.gate_up), ("wo", bank.down)):
            for weight, value in zip(self._linear(name), stacked, strict=True):
                weight.copy_(value)

    def activation(self) -> Activation:
        return _plain(next(iter(self.module.values())).act)


class SingleUnits(Layout):
    """Doge: expert e is one hidden unit, row e of two embeddings: ``up_embed[e] * act(down_embed[e] . x)``."""

    gated = False

    def read(self) -> dict[str, Tensor | None]:
        up, down = self.module.down_embed.weight[:, None, :], self.module.up_embed.weight[:, :, None]
        return {"gate_up": up, "down": down, "gate_up_bias": None, "down_bias": None}

    def write(self, bank: DenseBank) -> None:
        self.module.down_embed.weight.copy_(bank.gate_up[:, 0])
        self.module.up_embed.weight.copy_(bank.down[:, :, 0])

    def activation(self) -> Activation:
        return _plain(self.module.act_fn)


def _activation(module: Any, gated: bool, interleaved: bool) -> Activation:
    if not gated:
        return _plain(module.act_fn)
    gate = getattr(type(module), "_apply_gate", _stock._default_apply_gate)
    if gate is _stock._default_apply_gate:
        return _gated(module.act_fn)
    name = f"{type(module).__name__}._apply_gate"
    if not interleaved:
        return Activation(name, module._apply_gate)

    def from_halves(gate_up: Tensor) -> Tensor:
        halves = gate_up.unflatten(-1, (2, -1))
        return module._apply_gate(halves.transpose(-1, -2).flatten(-2))

    return Activation(name, from_halves)


def _describe(act: Callable[[Tensor], Tensor]) -> str:
    return getattr(act, "__name__", type(act).__name__)


def _plain(act: Callable[[Tensor], Tensor]) -> Activation:
    return Activation(_describe(act), act, gated=False)


def _gated(act: Callable[[Tensor], Tensor]) -> Activation:
    """``act(gate) * up``; the shared :data:`SILU_MUL` where ``act`` is SiLU, told by its values, not its name."""
    grid = torch.linspace(-8, 8, 33, device="cpu")
    if torch.equal(act(grid), F.silu(grid)):
        return SILU_MUL

    def multiply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    return Activation(f"{_describe(act)}_mul", multiply)
