"""A router that may be told the task, and learns to do without.

Shapes by suffix: T tokens, H hidden size, E choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..contract import Context
from ..errors import OptionError
from .given import label_of
from .parts import Site


class TaskAware(nn.Module):
    """``W [norm(x); t]``: t is the embedding of the token's task, zeros where it is not known (CDSP-MoE).

    While training a token's task is hidden with the chance ``hidden``. ``tasks`` is how many there are.
    """

    def __init__(self, site: Site, *, tasks: int, width: int = 32, hidden: float = 0.1) -> None:
        super().__init__()
        if min(tasks, width) < 1 or not 0 <= hidden <= 1:
            raise OptionError(
                f"a task-aware router needs tasks >= 1, width >= 1 and 0 <= hidden <= 1, got {tasks}, {width} and "
                f"{hidden:g}"
            )
        self.hidden, self.tasks = hidden, tasks
        self.norm = nn.LayerNorm(site.hidden_size)
        self.embedding = nn.Embedding(tasks, width)
        self.weight = nn.Parameter(torch.zeros(site.choices, site.hidden_size + width))

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:
        task = torch.zeros(len(x_TH), self.embedding.embedding_dim, dtype=x_TH.dtype, device=x_TH.device)
        if context.task is not None:
            task_T = label_of(context, "task", self.tasks)
            told = torch.rand(len(x_TH), 1, device=x_TH.device) >= (self.hidden if self.training else 0)
            task = self.embedding(task_T).to(x_TH.dtype) * told
        return F.linear(torch.cat((self.norm(x_TH), task), dim=1), self.weight)
