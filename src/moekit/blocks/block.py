"""One MoE layer of a live model: a view of its router, experts and shared experts, never a copy.

Shapes by suffix: T tokens, H hidden size of the experts, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..bank import ExpertBank
from ..contract import Context, RouterEdit, Routing, weighted_sum
from ..errors import PlanError
from ..kernels import run as run_bank
from ._layout import Layout
from .edit import Edit
from .observe import Observation, Observer
from .router import FamilyRouter, compose, forbid


class MoEBlock:
    """A view of one MoE block.

    ``name`` is the path of the module that holds router and experts, ``layer`` the number of its decoder layer,
    ``experts`` and ``router_module`` the live modules, ``router`` the family's routing recomposed in three stages,
    ``shared`` the modules every token passes, ``groups`` (number of groups, groups kept) or None. Views go stale when
    the model is rebuilt (:func:`select_experts`): ask for them again.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        module: nn.Module,
        experts: nn.Module,
        layout: Layout,
        router: FamilyRouter,
        shared: tuple[nn.Module, ...] = (),
        neighbours: tuple[nn.Module, ...] = (),
    ) -> None:
        self.name, self.layer = name, layer
        self.module, self.experts, self.shared, self.neighbours = module, experts, shared, neighbours
        self.layout, self.router = layout, router
        self.router_module: nn.Module = router.module
        self.num_experts = layout.num_experts
        self.top_k = router.recipe.top_k
        self.groups = router.recipe.groups

    def __repr__(self) -> str:
        return f"MoEBlock({self.name!r}, experts={self.num_experts}, top_k={self.top_k})"

    @property
    def hidden_size(self) -> int:
        """The width experts read and write; some families project the model's own width to it first."""
        return self.layout.hidden_size

    def bank(self) -> ExpertBank:
        """The experts in canonical orientation, sharing memory with the parameters where the layout allows it."""
        return self.layout.bank()

    def put(self, bank: ExpertBank) -> None:
        """Write a bank of the same shapes back into the live parameters; raises :class:`PlanError` otherwise."""
        self.layout.put(bank)

    def edit(self, edit: RouterEdit) -> Edit:
        """Change the live routing: ``with block.edit(...):``, or ``.attach()`` for a handle with ``.remove()``.

        Edits on one block add up: their functions run in the order they were attached.
        """
        return Edit(self, edit)

    def mask(self, experts: Sequence[int]) -> Edit:
        """Let only these experts be chosen, exactly as if the others were not there: logits, biases, groups.

        Raises :class:`PlanError` for an empty list or an expert that does not exist.
        """
        wrong = [e for e in experts if not 0 <= e < self.num_experts]
        if wrong or not experts:
            what = f"no expert {wrong[0]}" if wrong else "nothing left when all experts are masked"
            raise PlanError(f"{self.name} has {what}: name at least one of 0 to {self.num_experts - 1}")
        return Edit(self, forbid(list(experts), self.num_experts))

    def observe(self, callback: Callable[[Observation], Any]) -> Observer:
        """Call ``callback`` with an :class:`Observation` at each forward of this block, while the context is open."""
        return Observer(self, callback)

    def choose(self, x_TH: Tensor, context: Context | None = None, edit: RouterEdit | None = None) -> Routing:
        """The routing of flat router inputs: score, select, weigh, with an edit applied after each stage."""
        context = self.router.entered(x_TH, context or Context())
        return compose(self.router, self.router.score(x_TH, context), context, edit)

    def routed(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """What the experts add [T, H] under a routing: their outputs, weighted and summed."""
        return weighted_sum(self.run(x_TH, routing), routing)

    def run(self, x_TH: Tensor, routing: Routing) -> Tensor:
        """Unweighted outputs [T, K, H] of the routed experts on ``x_TH``; zero where a slot is unused.

        Where a family multiplies an expert's input by the weight (Llama 4), the output is divided by it, so that the
        weighted sum is the family's in every case.
        """
        stored, weight = self.layout.stored(routing.expert), routing.weight.to(x_TH.dtype)[..., None]
        if self.layout.weights_on_input:
            rows_SH = (x_TH[:, None] * weight).flatten(0, 1)
            pairs = Routing(stored.reshape(-1, 1), routing.weight.reshape(-1, 1))
            slots = run_bank(self.bank(), rows_SH, pairs).view(*stored.shape, -1) / weight
        else:
            slots = self.layout.finish(run_bank(self.bank(), x_TH, Routing(stored, routing.weight)))
        return slots.where(routing.used[..., None], 0)
