"""A checkpoint as a plan would leave it, with nothing written: what is read of it is read from the source.

Of a plan that drops experts only the bytes of those that stay are ever read, so that a model can be loaded, run or
streamed with the experts of one task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from moekit.checkpoint import Checkpoint
from moekit.checkpoint.headers import TensorInfo
from moekit.checkpoint.reader import Reader
from moekit.checkpoint.shards import Lazy
from moekit.plan.document import Plan
from moekit.plan.produce import produce


def partial_checkpoint(source: Checkpoint, plan: Plan) -> Checkpoint:
    """``source`` under ``plan``: give it to ``open_model`` or ``LoadedModel.load``.

    PlanError where the plan is not sane for the source, or no stock or moekit layout can hold it.
    """
    made = produce(source, plan)
    infos = {
        name: TensorInfo(name, "", lazy.dtype, tuple(lazy.shape), 0, lazy.nbytes) for name, lazy in made.tensors.items()
    }
    return Checkpoint(source.path, dict(made.config), infos, _Made(source, infos, made.tensors))


class _Made(Reader):
    """Reads tensors by making them."""

    def __init__(self, source: Checkpoint, infos: Mapping[str, TensorInfo], tensors: Mapping[str, Lazy]) -> None:
        super().__init__(source.path, infos)
        self._tensors = tensors

    def read(self, name: str) -> Tensor:
        info = self.info(name)
        self.counted_bytes += info.nbytes
        return self._tensors[name].make()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def chunks(self, name: str) -> Iterator[Tensor]:
        yield self.read(name).flatten()
