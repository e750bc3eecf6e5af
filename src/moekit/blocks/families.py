"""Which MoE families the installed transformers has, and which of them moekit cannot work on, with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

UNSUPPORTED: dict[str, str] = {
    "nllb_moe": (
        "stock transformers runs expert_0 and expert_1 for every token, whatever the router chose (it one-hot encodes "
        "a 0/1 mask), so there is no routing to read or edit"
    ),
    "vitpose_backbone": "its experts are picked by the number of the data set, not by a router",
}
"""Every exception, in one place."""

_MARK = re.compile(r"^@use_experts_implementation|^class \w*(?:Experts|CDMoE|NaiveMoe)\(", re.MULTILINE)


def families() -> dict[str, str | None]:
    """Every family of the installed transformers whose modeling file has experts: None, or why it is unsupported."""
    folder = Path(transformers.__file__).parent / "models"
    found = [p.parent.name for p in folder.glob("*/modeling_*.py") if _MARK.search(p.read_text(encoding="utf-8"))]
    return {name: UNSUPPORTED.get(name) for name in sorted(found)}
