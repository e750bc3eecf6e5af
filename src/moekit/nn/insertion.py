"""New experts in a trained model: what it knew stays as it was, what it learns goes elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .config import MoekitConfig
from .model import MoekitForCausalLM

EXPERTS, ROUTER = ".experts.", ".gate."


class Held(nn.Module):
    """After each optimizer step old places of grown parameters go back by ``pull`` of the way to what they were.

    Places within experts go all of it. It is no part of what is saved: a reloaded model is free.
    """

    def __init__(self, pull: float) -> None:
        super().__init__()
        self.pull = pull
        self.kept: list[tuple[nn.Parameter, tuple[Tensor, ...], Tensor, float]] = []

    def keep(self, parameter: nn.Parameter, places: tuple[Tensor, ...], name: str) -> None:
        """What ``parameter`` has in ``places`` now is what it goes back to."""
        self.kept.append((parameter, places, parameter.detach()[places].clone(), 1.0 if EXPERTS in name else self.pull))

    @torch.no_grad()
    def finish_step(self) -> None:
        for parameter, places, start, pull in self.kept:
            start = start.to(parameter)
            parameter[places] = start if pull == 1 else torch.lerp(parameter[places], start, pull)


def inserted(model: MoekitForCausalLM, count: int, *, pull: float = 1.0) -> MoekitForCausalLM:
    """A copy of the model with ``count`` more experts in every MoE layer, numbered after those there were.

    ModuleFormer, extension by new modules: new experts and their rows of the routers are drawn like those of a new
    model, and old experts never move. Old rows of routers are held too, or with a ``pull`` below 1 only drawn back by
    that share after every step (a decoupled penalty on their distance from the start; 0 leaves them free). Train it
    with ``what=["*.mlp.experts.*", "*.mlp.gate.*"]``: everything else is held by not being trained.

    Raises:
        OptionError: no expert to add, a pull that is no share, or parameters that do not grow by one row per expert.
    """
    if count < 1 or not 0 <= pull <= 1:
        raise OptionError(f"{count} experts to insert with a pull of {pull:g}: give 1 or more, and a share")
    told = model.config.to_dict()
    old = told["num_experts"]
    told["num_experts"] = [n + count for n in old] if isinstance(old, list) else old + count
    new = MoekitForCausalLM(MoekitConfig(**told)).to(model.device, model.dtype).train(model.training)
    held, before, after = Held(pull), model.state_dict(), new.state_dict()
    parameters = dict(new.named_parameters())
    with torch.no_grad():
        for name, value in before.items():
            grown = [own != was for own, was in zip(after[name].shape, value.shape, strict=True)]
            if not any(grown):
                after[name].copy_(value)
                continue
            places = _places(model, name, value, after[name], count)
            after[name][places] = value.to(after[name])
            if name in parameters:
                held.keep(parameters[name], places, name)
    new.add_module("held", held)
    return new


def _places(model: nn.Module, name: str, old: Tensor, new: Tensor, count: int) -> tuple[Tensor, ...]:
    """Where an old tensor lies in the new one, to index with: new experts stand before those of other kinds."""
    sizes = {size - was for size, was in zip(new.shape, old.shape, strict=True)} - {0}
    path = name.partition(EXPERTS if EXPERTS in name else ROUTER)[0]
    if sizes != {count} or path == name:
        raise OptionError(f"{name} grows from {list(old.shape)} to {list(new.shape)}: it has no place for new experts")
    first = model.get_submodule(path).num_experts
    places = []
    for axis, (was, size) in enumerate(zip(old.shape, new.shape, strict=True)):
        index = torch.arange(size, device=new.device)
        if was != size:
            index = torch.cat((index[:first], index[first + count :]))
        if len(index) != was:
            raise OptionError(f"{name} has {was} rows, which are not one for each of {first} experts")
        places.append(index.view(-1, *[1] * (old.dim() - 1 - axis)))
    return tuple(places)
