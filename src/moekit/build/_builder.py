"""What every builder is: something that makes a Mixture-of-Experts model of a dense one.

A builder is a frozen dataclass, and the dataclass is its configuration, as with compression methods. It changes the
model it is given in memory and says what came of it; writing is the engine's (``_write``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from moekit.errors import OptionError, TextError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moekit.checkpoint import Checkpoint
    from moekit.plan import Plan
    from moekit.train.preference import Pair

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a builder trains on: ``rows`` of token ids; ``pairs`` of continuations, one better than the other."""

    rows: Sequence[Tensor] = ()
    pairs: Sequence[Pair] = ()
    batch_size: int = 8
    progress: Progress | None = None

    def need_rows(self, method: str) -> Sequence[Tensor]:
        """The rows; TextError without any."""
        if not self.rows:
            raise TextError(f"{method} trains on text: give --text FILE")
        return self.rows


@dataclass(frozen=True)
class Built:
    """``model`` is what the method made, in memory. ``report`` (JSON) says what training did and what was checked.

    ``no_stock``: why no stock checkpoint can hold it, or None. ``carrier`` is the stock model that is written (the
    model itself, unless it holds modules of our own), and ``export`` the plan that makes moekit's own format of it.
    """

    model: PreTrainedModel
    report: dict[str, Any] = field(default_factory=dict)
    no_stock: str | None = None
    carrier: PreTrainedModel | None = None
    export: Callable[[Checkpoint], Plan] | None = None


class Builder(ABC):
    """``build`` may change ``model``, which is dense, in float32 and the caller's to give away."""

    trains: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def spec(self) -> str:
        """The method and all its options as one would type them: ``sparse-unified:experts=8,top_k=4``."""
        values = [f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self)]  # type: ignore[arg-type]
        return f"{self.name}:{','.join(values)}" if values else self.name

    @abstractmethod
    def build(self, model: PreTrainedModel, material: Material) -> Built: ...


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check(condition: bool, message: str) -> None:
    """OptionError with this line unless the condition holds."""
    if not condition:
        raise OptionError(message)
