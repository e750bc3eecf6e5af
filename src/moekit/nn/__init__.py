"""Layers to build with: routers, experts, balance, attention, and the language model they are parts of.

Names load on first use: transformers learns of the configuration without paying for the model.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "balance": ("BALANCES", "Seen", "balance_term"),
    "config": ("MoekitConfig",),
    "correction": ("Correction", "max_violation"),
    "elastic": ("restricted",),
    "experts": ("KINDS", "Experts", "FeedForward", "Standalone"),
    "flow": ("begin",),
    "insertion": ("inserted",),
    "layer": ("MoE", "finish_step", "initialise"),
    "model": ("MoekitForCausalLM", "MoekitModel"),
    "parts": ("Site", "make"),
    "router": ("Router",),
    "schedule": ("Schedule",),
    "slices": ("cut", "joined"),
    "stock": ("export",),
}
_FILE = {name: file for file, names in _PUBLIC.items() for name in names}

__all__ = sorted(_FILE)


def __getattr__(name: str) -> Any:
    if name in _FILE:
        return getattr(import_module(f"moekit.nn.{_FILE[name]}"), name)
    raise AttributeError(f"module 'moekit.nn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
