"""The model on disk: what is where, down to the single expert, and how it is written back."""

from moekit.checkpoint.checkpoint import Checkpoint
from moekit.checkpoint.headers import TensorInfo
from moekit.checkpoint.layers import ExpertTensor, MoELayer, RowTensor
from moekit.checkpoint.storage import Stored
from moekit.checkpoint.summary import LayerSummary, Summary
from moekit.checkpoint.writer import Writer

__all__ = [
    "Checkpoint",
    "ExpertTensor",
    "LayerSummary",
    "MoELayer",
    "RowTensor",
    "Stored",
    "Summary",
    "TensorInfo",
    "Writer",
]
