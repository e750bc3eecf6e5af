"""How a configuration names its parts, and what each part is told about the place it gets.

A part is named by a word ("top-k") or by a table with its options ({kind = "top-p", p = 0.4}); every part's class takes
the :class:`Site` first and its options by keyword, with annotations that values are held against. What an attribute may
be, also when a schedule moves it, is said by :mod:`moekit.nn.limits`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from torch import nn

from ..errors import OptionError

Part = TypeVar("Part")
Spec = str | Mapping[str, Any]
_POOL: ContextVar[dict[str, nn.Module] | None] = ContextVar("pool", default=None)


@contextmanager
def one_model() -> Iterator[None]:
    """Sites made inside are places in the layers of one model, which may have modules in common."""
    token = _POOL.set({})
    try:
        yield
    finally:
        _POOL.reset(token)


def _pool() -> dict[str, nn.Module]:
    pool = _POOL.get()
    return {} if pool is None else pool


@dataclass(frozen=True, kw_only=True)
class Site:
    """The place of a part: one MoE layer of a model.

    ``num_experts`` counts experts with stacked weights, ``choices`` all that a router may choose (those, then experts
    of other kinds); ``layer`` is the number of the decoder layer out of ``num_layers``. ``common`` holds the modules
    that layers of one model have in common.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int = 1
    choices: int = 0
    layer: int = 0
    num_layers: int = 1
    vocab_size: int = 0
    activation: str = "silu"
    common: dict[str, nn.Module] = field(default_factory=_pool, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise OptionError(f"{self.num_experts} experts: an MoE layer needs one at least")
        object.__setattr__(self, "choices", max(self.choices, self.num_experts))
        if not 1 <= self.top_k <= self.choices:
            raise OptionError(f"top-k of {self.top_k} among {self.choices} experts: give 1 to {self.choices}")

    def shared(self, name: str, create: Callable[[], nn.Module]) -> Any:
        """The module of this name that layers have in common: whoever asks first creates it.

        It is trained and saved once: the model declares what it finds twice as tied.
        """
        if name not in self.common:
            self.common[name] = create()
        return self.common[name]


def repeated(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that several modules hold, each with the first name of the same parameter."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def make(what: str, table: Mapping[str, Callable[..., Part]], spec: Spec, *given: Any) -> Part:
    """The part of ``table`` that ``spec`` names, built with ``given`` and the options of the spec.

    Raises :class:`OptionError` for a name that is not in the table, and what :func:`built` refuses.
    """
    if not isinstance(spec, str | Mapping):
        raise OptionError(f"{what} {spec!r}: give a name, or a table with the name as its kind and options")
    options = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = str(options.pop("kind", None))
    if kind not in table:
        raise OptionError(f"{what} {kind!r} is not known: choose one of {', '.join(sorted(table))}")
    return built(f"{what} {kind!r}", table[kind], options, *given)


def built(what: str, create: Callable[..., Part], options: Mapping[str, Any], *given: Any) -> Part:
    """What ``create`` makes of ``given`` and, by keyword, of ``options``.

    Raises :class:`OptionError` for an option it does not have, a missing one, and a value its annotation excludes.
    """
    parameters = inspect.signature(create, eval_str=True).parameters.values()
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name, value in options.items():
        if name not in known:
            has = f"has {', '.join(known)}" if known else "has no options"
            raise OptionError(f"{what} has no option {name!r}: it {has}")
        if not fits(value, known[name].annotation):
            raise OptionError(f"{what} cannot have {name}={value!r}: give {wanted(known[name].annotation)}")
    for p in known.values():
        if p.default is p.empty and p.name not in options:
            raise OptionError(f"{what} needs the option {p.name!r}")
    return create(*given, **options)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says: whole numbers are floats too, truth is no number, nor is NaN."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if get_origin(hint) is Literal:
        return value in inner
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    kind = get_origin(hint) or hint
    if kind is Sequence:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    return kind is Any or kind is inspect.Parameter.empty or isinstance(value, kind)


_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a name", Mapping: "a table"}


def wanted(hint: Any) -> str:
    """An annotation in words."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(wanted(one) for one in inner if one is not NoneType)
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is Sequence:
        return f"a list, each of it {wanted(inner[0])}"
    return _WORDS.get(Mapping if kind is dict else kind, str(kind))
