"""A family's router as the contract's three stages: views of the live module's parameters, never copies.

Shapes by suffix: T tokens, H hidden size, K slots, E experts, C columns of the logits (E plus any tail classes).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..contract import PAD, Context, RouterEdit, Routing
from ..errors import UnsupportedModelError
from . import _identify
from .recipe import Recipe

_KNOWN: dict[Any, tuple[Recipe, dict[str, Any]]] = {}


class FamilyRouter:
    """Stages recomposed over a live router module.

    ``score`` runs the family's own forward and keeps its logits, so that norms, soft caps, MLPs and dtypes are the
    family's own; ``select`` and ``weigh`` follow the recipe identified for it. ``num_experts`` counts what may be
    selected: the experts, then any classes beyond them (identity experts). Unlike the bare contract, ``weigh`` accepts
    PAD in its ids and leaves such slots out of the normalisation.
    """

    chooses = True
    """False where the recipe gives the weights only and the choice is made in another way."""
    positions = (0, 1, 2)
    """Where logits, weights and ids stand in the tuple the module returns."""
    at_experts = False
    """True where the choice is made after the router module returns, so that edits go in at the experts' inputs."""
    inline = False
    """True where neither router nor experts are called as modules, so that edits correct the block's output."""

    def __init__(self, module: nn.Module, parent: nn.Module, num_experts: int, recipe: Recipe, **traits: Any) -> None:
        self.module: Any = module
        self.parent: Any = parent
        self.recipe = recipe
        self.input_dims: int = traits.get("input_dims", 2)
        self.positions = traits.get("positions", self.positions)
        self.probabilities: bool = traits.get("probabilities", False)
        self.skips_from: int | None = traits.get("skips_from")
        self.num_experts: int = num_experts if self.skips_from is not None else traits.get("rows", num_experts)

    @classmethod
    def build(cls, module: nn.Module, parent: nn.Module, num_experts: int) -> Self:
        """The router of a live module; which recipe it follows is found by experiment, once per kind of router.

        Raises :class:`UnsupportedModelError` where no recipe repeats what the module does.
        """
        key = cls, *_identify.fingerprint(module, parent, num_experts)
        if key not in _KNOWN:
            _KNOWN[key] = cls._identified(module, parent, num_experts)
        recipe, traits = _KNOWN[key]
        return cls(module, parent, num_experts, recipe, **traits)

    @classmethod
    def _identified(cls, module: nn.Module, parent: nn.Module, num_experts: int) -> tuple[Recipe, dict[str, Any]]:
        trial = _identify.try_out(module, num_experts)
        positions = None if trial is None else _identify.locate(trial.output, num_experts)
        if trial is None or positions is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} does not return (logits, weights, ids) as transformers' routers do, and "
                "moekit has no entry for it: add one to blocks/deviants.py"
            )
        logits, weight, expert = (trial.output[i] for i in positions)
        skips = num_experts if logits.shape[1] > num_experts and bool((weight == 0).any()) else None
        traits = {"positions": positions, "input_dims": trial.input_dims, "skips_from": skips}
        for probabilities in (False, True):
            seen = logits.log() if probabilities else logits
            recipe = _identify.identify(trial, seen, weight, expert, skips_from=skips, choice=cls.chooses)
            if recipe is not None:
                return recipe, traits | {"probabilities": probabilities, "rows": logits.shape[1]}
        raise UnsupportedModelError(
            f"the routing of {type(module).__name__} matches none of moekit's recipes: add it to blocks/deviants.py"
        )

    # -- the three stages

    def score(self, x_TH: Tensor, context: Context) -> Tensor:
        return self.logits(self._forward(x_TH, context), x_TH)

    def select(self, logits_TE: Tensor, context: Context, bias: Tensor | None = None) -> Tensor:
        expert = self.recipe.select(logits_TE, self.bias(context), bias)
        return expert if self.skips_from is None else expert.masked_fill(expert >= self.skips_from, PAD)

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor, context: Context) -> Tensor:
        scale = None if self.recipe.expert_scale is None else self.module.get_parameter(self.recipe.expert_scale)
        return self.recipe.weigh(logits_TE, expert_TK, scale)

    # -- what the live module returns, read and rewritten

    def logits(self, output: Any, x_TH: Tensor) -> Tensor:
        """Logits [T, C] out of the module's output; the logarithm where a family returns probabilities."""
        raw = output[self.positions[0]]
        raw = raw.reshape(-1, raw.shape[-1])
        return raw.log() if self.probabilities else raw

    def read(self, output: Any) -> tuple[Tensor, Tensor]:
        """The module's own (ids, weights), each [T, K]."""
        weight, expert = output[self.positions[1]], output[self.positions[2]]
        return expert.reshape(-1, expert.shape[-1]).long(), weight.reshape(-1, weight.shape[-1])

    def write(self, output: Any, routing: Routing, context: Context) -> Any:
        """The module's output with another routing in it: a new tuple of the family's own form."""
        new = list(output)
        logits, weights, index = self.positions
        assert routing.logits is not None
        out = routing.logits.softmax(-1) if self.probabilities else routing.logits
        new[logits] = out.reshape(output[logits].shape).to(output[logits].dtype)
        new[weights] = routing.weight.to(output[weights].dtype)
        new[index] = filled(routing).to(output[index].dtype)
        return tuple(new)

    def read_call(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(ids, weights), each [T, K], from the arguments ``(hidden, ids, weights)`` of a call to the experts."""
        expert, weight = args[1], args[2]
        return expert.reshape(-1, expert.shape[-1]).long(), weight.reshape(-1, weight.shape[-1])

    def write_call(self, args: tuple[Any, ...], routing: Routing) -> tuple[Any, ...]:
        """The experts' arguments with another routing in them."""
        return (args[0], filled(routing).to(args[1].dtype), routing.weight.to(args[2].dtype), *args[3:])

    # -- what removing experts means for the module

    def check_kept(self, name: str, experts: list[int]) -> None:
        """Raise :class:`PlanError` if the block called ``name`` cannot keep just these experts."""

    def own_rows(self, tensor_name: str, experts: list[int]) -> list[int] | None:
        """Rows of a tensor to keep where they are not one run per expert; None for the ordinary case."""
        return None

    # -- how the module is called

    def context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Context]:
        """The flat hidden states [T, H] of a call to the module, and everything else it was given."""
        bound = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments
        (_, hidden), *others = bound.items()
        batch, tokens = (hidden.shape[0], hidden.shape[1]) if hidden.dim() == 3 else (1, hidden.shape[0])
        sequence = torch.arange(batch, device=hidden.device).repeat_interleave(tokens)
        ids = bound.get("input_ids")
        return hidden.reshape(-1, hidden.shape[-1]), Context(
            sequence=sequence, input_ids=None if ids is None else ids.reshape(-1), extra=dict(others)
        )

    def entered(self, x_TH: Tensor, context: Context) -> Context:
        """The context of one pass through the three stages."""
        return context

    def bias(self, context: Context) -> Tensor | None:
        """The family's own selection bias [C], wherever it lives: on the router, on the block, or passed in."""
        name = self.recipe.bias_name
        if name is None:
            return None
        if name in context.extra:
            found = context.extra[name]
        elif name in self._parameters():
            found = getattr(self.parent, name, None)
        else:
            found = _tensor(self.module, name)
        return None if found is None else found.reshape(-1)

    def _parameters(self) -> list[str]:
        return list(inspect.signature(self.module.forward).parameters)[1:]

    def _forward(self, x_TH: Tensor, context: Context) -> Any:
        """The family's own forward on flat tokens, past any hooks. Tokens of one sequence must lie together."""
        hidden, extra = x_TH, dict(context.extra)
        if self.input_dims == 3:
            rows = 1 if context.sequence is None else int(context.sequence.unique().numel())
            hidden = x_TH.reshape(rows, -1, x_TH.shape[-1])
        for name in self._parameters():
            if name not in extra and "bias" in name:
                extra[name] = getattr(self.parent, name, None)
            elif name not in extra and name == "input_ids":
                if context.input_ids is None:
                    raise UnsupportedModelError(
                        f"{type(self.module).__name__} routes by token id: give Context(input_ids=...) with the tokens"
                    )
                extra[name] = context.input_ids
        return self.module.forward(hidden, **extra)


def compose(router: FamilyRouter, logits: Tensor, context: Context, edit: RouterEdit | None = None) -> Routing:
    """Selection and weighting from given logits, with an edit applied after each stage.

    The same as :func:`moekit.contract.route` from the logits on, except that dropped slots (PAD) reach ``weigh``, which
    leaves them out of the normalisation.
    """
    edit = edit or RouterEdit()
    if edit.after_score:
        logits = edit.after_score(logits, context)
    expert = router.select(logits, context, edit.selection_bias)
    if edit.after_select:
        expert = edit.after_select(expert, context)
    routing = Routing(expert, router.weigh(logits, expert, context).masked_fill(expert < 0, 0), logits)
    return edit.after_weigh(routing, context) if edit.after_weigh else routing


def filled(routing: Routing) -> Tensor:
    """Ids [T, K] with unused slots pointing at an expert the token uses anyway: their weight is 0, nothing is added."""
    anyone = routing.expert.max(dim=-1, keepdim=True).values.clamp(min=0)
    return torch.where(routing.used, routing.expert, anyone)


def forbid(experts: list[int], num_experts: int) -> RouterEdit:
    """An edit under which only the given experts can be chosen; classes beyond the experts stay allowed.

    -inf in the logits takes the others out of every softmax, and ``select`` never ranks such an expert, whatever bias
    is added after: masking logits alone would let a bias lift it back.
    """
    dropped = sorted(set(range(num_experts)) - set(experts))

    def drop(logits: Tensor, context: Context) -> Tensor:
        out = logits.clone()
        out[..., dropped] = -math.inf
        return out

    return RouterEdit(after_score=drop)


def merge(edits: list[RouterEdit]) -> RouterEdit:
    """Several edits as one: functions run in order, biases add up."""

    def chain(name: str) -> Any:
        functions = [f for edit in edits if (f := getattr(edit, name)) is not None]
        if not functions:
            return None

        def run(value: Any, context: Context) -> Any:
            for function in functions:
                value = function(value, context)
            return value

        return run

    biases = [edit.selection_bias for edit in edits if edit.selection_bias is not None]
    total = None
    for bias in biases:
        total = bias if total is None else total + bias.to(total.device)
    return replace(
        RouterEdit(selection_bias=total),
        **{name: chain(name) for name in ("after_score", "after_select", "after_weigh")},
    )


def _tensor(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)
