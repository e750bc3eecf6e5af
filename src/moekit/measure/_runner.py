"""What a measurement needs of a model: logits, batch by batch, whether it lies in memory or streams from disk."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor


class Runner(Protocol):
    """A model that can be run; `moekit.stream.open_model` gives one."""

    @property
    def model(self) -> Any:
        """The live model (a skeleton, where it streams)."""
        ...

    def forward(self, batches: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
        """Logits [B, S, V] of each batch in order; whoever consumes them decides how many exist at once."""
        ...
