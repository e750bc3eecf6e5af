"""A stock transformers model whose experts are spread over ranks, each with its own batches.

Under ``torchrun``, every rank loads the model, calls :func:`attach` and keeps only its share of the experts; the rest
of the model is replicated. Works through transformers' registry of experts implementations, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit.contract import Routing
from moekit.errors import UnsupportedModelError
from moekit.formats import DenseBank
from moekit.kernels._layer import Layer, is_decorated
from moekit.parallel._errors import ParallelError
from moekit.parallel._groups import Groups, degree_for, sum_gradients
from moekit.parallel._shards import collect
from moekit.parallel._world import World
from moekit.parallel.dispatch import Layout, Planner, native
from moekit.parallel.engine import Engine

NAME = "moekit-parallel"
_ENGINE = "_moekit_parallel"


class Attached(NamedTuple):
    """What an experts module carries while it is spread; ``across`` is None where every expert is stored once."""

    engine: Engine
    across: World | None
    before: str | None


def attach(
    model: nn.Module,
    world: World,
    layouts: Mapping[str, Layout] | None = None,
    planner: Planner = native,
    degree: int | None = None,
    **options: Any,
) -> dict[str, Engine]:
    """Keep this rank's share of every experts module and run them all together; {path of the module: its engine}.

    ``layouts`` says who stores what in the modules it names; the others are cut into equal runs of experts. With a
    ``degree`` each layer is spread over groups of at most so many ranks, and of no more than it has experts, and every
    group has the whole layer (expert times data parallelism, layer by layer). ``options`` are those of
    :class:`Engine`. A collective call. Gradients of the experts are sums over the batches of the ranks that share them,
    those of the rest each rank's own, until :func:`reduce_replicated` sums both.

    Raises:
        UnsupportedModelError: no experts module of transformers' shared contract, or weights behind its experts.
        ParallelError: attached already, a layout for a module that does not exist, or that does not fit.
    """
    found = {name: module for name, module in model.named_modules() if is_decorated(module)}
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no experts module of transformers' shared contract")
    unknown = set(layouts or ()) - found.keys()
    if unknown:
        raise ParallelError(f"no experts module {min(unknown)!r} here: the first is {next(iter(found))!r}")
    engines, groups, across = {}, dict[int, Groups](), dict[str, World]()
    for name, module in found.items():
        _check(name, module)
        inside = world
        if degree is not None:
            size = degree_for(module.num_experts, world, degree)
            groups[size] = groups.get(size) or Groups.of(world, size)
            inside, across[name] = groups[size].inside, groups[size].across
        layout = (layouts or {}).get(name) or Layout.contiguous(module.num_experts, inside.size)
        if (layout.num_experts, layout.slices) != (module.num_experts, 1):
            raise ParallelError(f"{name} has {module.num_experts} whole experts, its layout {len(layout.owner)} units")
        engines[name] = Engine(inside, layout, planner, **options)
    _register()
    before = {name: module.config._experts_implementation for name, module in found.items()}
    for name, module in found.items():
        own = torch.tensor(engines[name].layout.own(engines[name].world.rank), dtype=torch.int64)
        _replace(module, partial(_pick, own))
        module.__dict__[_ENGINE] = Attached(engines[name], across.get(name), before[name])
        module.config._experts_implementation = NAME
    return engines


def detach(model: nn.Module) -> None:
    """Give every rank all experts back, as they are by now, and the implementation from before. A collective call."""
    for module in [m for m in model.modules() if _ENGINE in m.__dict__]:
        attached = module.__dict__.pop(_ENGINE)
        _replace(module, partial(_whole, attached.engine))
        module.config._experts_implementation = attached.before


def reduce_replicated(model: nn.Module, world: World) -> None:
    """Sum gradients: of everything but the spread experts over all ranks, of those over the ranks with the same ones.

    One message for the rest, and one for each layer of which there are several copies. A collective call. Parameters
    without a gradient on this rank take part with zeros. Scale the loss by the tokens of all ranks (or divide by the
    number of ranks) to train on the mean.
    """
    spread = [module for module in model.modules() if _ENGINE in module.__dict__]
    known = {id(p) for module in spread for p in module.parameters(recurse=False)}
    sum_gradients(world, (p for p in model.parameters() if id(p) not in known))
    for module in spread:
        across = module.__dict__[_ENGINE].across
        if across is not None:
            sum_gradients(across, module.parameters(recurse=False))


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[T, H] of an attached module; the sentinel ``num_experts`` in ``top_k_index`` is an unused slot."""
    layer, engine = Layer.of_module(self), self.__dict__[_ENGINE].engine
    bank = DenseBank(layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias, layer.activation)
    used = (top_k_index >= 0) & (top_k_index < engine.num_experts)
    routing = Routing(top_k_index.masked_fill(~used, -1), top_k_weights.masked_fill(~used, 0))
    return engine.forward(bank, hidden_states, routing)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _check(name: str, module: Any) -> None:
    if _ENGINE in module.__dict__:
        raise ParallelError(f"{name} is spread over ranks already: call detach(model) first")
    layer = Layer.of_module(module)
    if layer.trainable_between or layer.finish is not None:
        raise UnsupportedModelError(f"{name} has weights of its own behind its experts, which cannot be spread yet")


def _pick(own: Tensor, stacked: Tensor) -> Tensor:
    return stacked[own.to(stacked.device)]


def _whole(engine: Engine, own: Tensor) -> Tensor:
    return collect(engine.world, engine.layout, [own])[0]


def _replace(module: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Every stacked parameter [E, ..] becomes what ``change`` makes of it."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        made = nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad)
        setattr(module, name, made)
