"""Where the scale of what a layer's experts read can be moved into weights: the norm before, and all who read it.

Found by experiment, not by name: a random double of the decoder layer, its experts and attention replaced by stand-ins,
shows whose output the experts read and who reads it besides. The claim that these are all is then tried: with the norm
divided by random scales and every reader's columns multiplied, the double must compute what it did.
Shapes by suffix: T tokens, H hidden size, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moekit.blocks import MoEBlock
from moekit.compress._double import Double, Elsewhere, NoDoubleError, double_of, run
from moekit.errors import PlanError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint

TOKENS, TOLERANCE = 24, 1e-4


@dataclass(frozen=True)
class Fold:
    """``norm``: the stored vectors [H] to divide; ``readers``: the stored matrices [R, H] whose columns to multiply
    (router, shared experts), besides those of the experts. ``offset``: the norm scales by 1 + weight."""

    norm: tuple[str, ...]
    readers: tuple[str, ...]
    offset: bool

    def edits(self, read: Callable[[str], Tensor], scale_H: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors that replace stored ones, and the scales that came out: what the norm's dtype can hold of
        ``scale_H``, so that norm and readers agree exactly. A channel that the norm silences keeps a scale of 1."""
        first, *others = self.norm
        weight = read(first)
        divided = _divided(weight, scale_H, self.offset)
        before, after = (w.float() + 1.0 * self.offset for w in (weight, divided))
        heard = (before != 0) & (after != 0)
        kept_H = torch.where(heard, before / after, 1.0)
        made = {first: torch.where(heard, divided, weight)}
        made |= {name: _divided(read(name), kept_H, self.offset) for name in others}
        for name in self.readers:
            weight = read(name)
            made[name] = (weight.float() * kept_H).to(weight.dtype)
        return made, kept_H


def find_fold(checkpoint: Checkpoint, model: nn.Module, block: MoEBlock) -> Fold:
    """The fold of one block of ``model``, a skeleton of ``checkpoint``.

    Raises:
        PlanError: the experts read no norm's output, something else reads it that scales cannot be moved into, or the
            tensors concerned are not stored plainly.
    """
    try:
        layer = _layer_of(block.name)
        double = double_of(model, layer, block)
        norm, readers, offset = _tried(double, block.hidden_size)
        vectors, matrices = (
            tuple(_stored(checkpoint, [f"{layer}.{name}" for name in found], block.hidden_size))
            for found in (norm, readers)
        )
        return Fold(vectors, matrices, offset)
    except NoDoubleError as why:
        raise PlanError(f"layer {block.name}: what its experts read cannot be scaled in the weights: {why}") from None


def _layer_of(name: str) -> str:
    """The decoder layer: the path up to the first number."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if numbered is None:
        raise NoDoubleError("it lies in no numbered layer")
    return ".".join(parts[: numbered + 1])


def _tried(double: Double, width: int) -> tuple[list[str], list[str], bool]:
    """(vectors of the norm, matrices that read it, whether it scales by 1 + weight), by their names in the layer."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, width, generator=draw)
    scale_H = torch.rand(width, generator=draw) + 0.5
    before = run(double, x)
    read = double.experts.seen
    if read is None:
        raise NoDoubleError("its layer runs without calling them")
    norm = next((n for n, made in before.outputs.items() if n in double.norms and _same(made, read)), None)
    if norm is None:
        raise NoDoubleError("they read no norm's output as it is")
    source = before.outputs[norm]
    readers = [name for name, seen in before.inputs.items() if any(_same(tensor, source) for tensor in seen)]
    matrices = [
        f"{name}.{own}"
        for name in readers
        for own, parameter in double.layer.get_submodule(name).named_parameters(recurse=False)
        if parameter.dim() == 2 and parameter.shape[-1] == width and name != double.place
    ]
    offset = _divide(double.norms[norm], x, scale_H)
    for name in matrices:
        double.layer.get_parameter(name).data.mul_(scale_H)
    double.experts.scale_H = scale_H
    after = run(double, x)
    if not torch.allclose(after.result, before.result, rtol=TOLERANCE, atol=TOLERANCE):
        others = sorted(name for name in readers if isinstance(double.layer.get_submodule(name), Elsewhere))
        who = ", ".join(others) or "something that is no matrix"
        raise NoDoubleError(f"{norm} is read by {who} as well")
    vectors = [f"{norm}.{own}" for own, _ in double.norms[norm].named_parameters()]
    return vectors, matrices, offset


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


@torch.no_grad()
def _divide(norm: nn.Module, x: Tensor, scale_H: Tensor) -> bool:
    """Divide what a norm returns by the scales, in its vectors; whether these count from 1."""
    wanted, own = norm(x) / scale_H, {name: p.clone() for name, p in norm.named_parameters()}
    for offset in (False, True):
        for name, parameter in norm.named_parameters():
            parameter.copy_(_divided(own[name], scale_H, offset))
        if torch.allclose(norm(x), wanted, rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    raise NoDoubleError("the norm before them scales neither by its weight nor by 1 + weight")


def _divided(weight: Tensor, scale_H: Tensor, offset: bool) -> Tensor:
    wide = weight.float() + 1.0 if offset else weight.float()
    return (wide / scale_H - 1.0 * offset).to(weight.dtype)


def _stored(checkpoint: Checkpoint, parameters: list[str], width: int) -> Iterator[str]:
    """The tensors on disk that become these parameters; each must end in an axis of the hidden size."""
    for parameter in parameters:
        names = [name for name, one in checkpoint.classified.parameters.items() if one == parameter]
        for name in names:
            if list(checkpoint.stored[name].tensors.values()) != [name]:
                raise NoDoubleError(f"{name} is stored quantised")
            if checkpoint.tensors[name].shape[-1] != width:
                raise NoDoubleError(f"{name} is not stored with its inputs along the last axis")
        if not names:
            raise NoDoubleError(f"{parameter} is not on disk under a name of its own")
        yield from names
