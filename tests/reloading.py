"""The proof that an output loads, in this process; that a new one loads outputs too is tested in tests/plan."""

from typing import Any

from moekit.plan import reload_check


def reload_here(folder: Any, *, with_moekit: bool, excused: Any = ()) -> dict[str, Any]:
    """Stands for ``reload_in_fresh_process``; moekit is there already, so a class of its own is told apart by name."""
    found = reload_check.check(str(folder))
    assert with_moekit or not found["model"].startswith("Moekit"), "stock transformers has no such class"
    return {"how": "loaded in this process", **found}
