"""Finding, reading, editing and shrinking the MoE blocks of a live model, of any family."""

from .block import MoEBlock
from .edit import Edit
from .families import UNSUPPORTED, families
from .find import blocks
from .observe import Observation, Observer

__all__ = ["UNSUPPORTED", "Edit", "MoEBlock", "Observation", "Observer", "blocks", "families"]
