"""Finding, reading, editing and shrinking the MoE blocks of a live model, of any family."""

from .block import MoEBlock
from .edit import Edit
from .families import UNSUPPORTED, families
from .find import blocks
from .observe import Observation, Observer
from .router import FamilyRouter, compose
from .select import select_experts

__all__ = [
    "UNSUPPORTED",
    "Edit",
    "FamilyRouter",
    "MoEBlock",
    "Observation",
    "Observer",
    "blocks",
    "compose",
    "families",
    "select_experts",
]
