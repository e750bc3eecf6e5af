"""How a bank is stored: dense, or in one of the formats of :data:`FORMATS`."""

from .dense import DenseBank
from .latent import LatentBank
from .lowrank import Factors, LowRankBank
from .nested import NestedBank, Plane
from .packed import WIDTHS, Codes, PackedBank, packed_nbytes
from .registry import FORMATS, allocate, with_tensors
from .ternary import Ternary, TernaryBank

__all__ = [
    "FORMATS",
    "WIDTHS",
    "Codes",
    "DenseBank",
    "Factors",
    "LatentBank",
    "LowRankBank",
    "NestedBank",
    "PackedBank",
    "Plane",
    "Ternary",
    "TernaryBank",
    "allocate",
    "packed_nbytes",
    "with_tensors",
]
