"""An expert that reads its tokens in order.

Shapes by suffix: M tokens of one expert, B sequences among them, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init

from ..errors import OptionError
from .parts import Site


class GRU(nn.Module):
    """``W gru(x)``: a recurrent expert with ``width`` units, over the tokens of a sequence that it is given (Hecto).

    What it returns for a token depends on the earlier ones it was given; every sequence begins with a zero state.
    """

    ordered = True
    cached = False

    def __init__(self, site: Site, *, width: int) -> None:
        super().__init__()
        if width < 1:
            raise OptionError(f"a recurrent expert of width {width}: give 1 or more")
        self.cell = nn.GRU(site.hidden_size, width, batch_first=True)
        self.out = nn.Linear(width, site.hidden_size, bias=False)

    def initialise(self, std: float) -> None:
        bound = self.cell.hidden_size**-0.5
        for parameter in self.cell.parameters():
            init.uniform_(parameter, -bound, bound)

    def forward(self, x_MH: Tensor, sequence_M: Tensor | None = None) -> Tensor | None:
        """[M, H]; tokens stand in order, those of one sequence together (``sequence_M``; all of them if None)."""
        if not len(x_MH):
            return None
        lengths = [len(x_MH)] if sequence_M is None else sequence_M.unique_consecutive(return_counts=True)[1].tolist()
        out, _ = self.cell(pad_sequence(list(x_MH.split(lengths)), batch_first=True))
        return self.out(torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)]))
