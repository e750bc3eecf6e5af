"""moekit: the toolkit for Mixture-of-Experts models.

Importing it registers ``experts_implementation="moekit"``, the quantisation method "moekit" and the model type "moekit"
with transformers, as soon as transformers itself is there. Public names load on first use.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from ._imports import when_imported

__version__ = "0.1.0"

_PUBLIC = {
    "bank": ("Activation", "ExpertBank", "ExpertWeights"),
    "blocks": ("MoEBlock", "families", "select_experts"),
    "checkpoint": ("Checkpoint",),
    "contract": ("Context", "Router", "RouterEdit", "Routing", "route"),
    "errors": ("MoekitError",),
    "formats": ("DenseBank", "PackedBank", "packed_nbytes"),
    "kernels": ("BankExperts", "explain", "prepare", "restore"),
    "measure": ("bits_per_byte", "compare"),
    "plan": ("LayerPlan", "Plan", "apply", "fit", "verify"),
    "profile": ("Profile",),
    "run": ("load", "paging"),
    "stream": ("StreamedModel", "open_model"),
}
_ROOM = {name: room for room, names in _PUBLIC.items() for name in names}
_VERBS = ("blocks", "profile")

__all__ = sorted([*_ROOM, *_VERBS])


class _Verb(ModuleType):
    """A room that is also the function of its name: ``moekit.blocks(model)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _VERBS or name in _PUBLIC:
        return import_module(f"moekit.{name}")
    if name in _ROOM:
        return getattr(import_module(f"moekit.{_ROOM[name]}"), name)
    raise AttributeError(f"module 'moekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


for _verb in _VERBS:
    when_imported(f"moekit.{_verb}", lambda room: setattr(room, "__class__", _Verb))
when_imported("transformers.integrations.moe", lambda _: import_module("moekit.kernels").register())
when_imported("transformers.models.auto.configuration_auto", lambda _: import_module("moekit.nn.config"))
when_imported("transformers.models.auto.modeling_auto", lambda _: import_module("moekit.nn.model"))
when_imported("transformers.modeling_utils", lambda _: import_module("moekit.checkpoint.quantizer"))
