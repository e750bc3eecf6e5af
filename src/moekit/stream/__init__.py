"""Running a model without holding it: layer by layer from disk, under a cap on memory."""

from moekit.stream import _footprint as footprint
from moekit.stream.memory import Cap, cap, gigabytes, parse_bytes, peak_rss, rss
from moekit.stream.runner import LoadedModel, Runner, open_model, pick_device
from moekit.stream.streamed import Beside, StreamedModel, smallest_cap

__all__ = [
    "Beside",
    "Cap",
    "LoadedModel",
    "Runner",
    "StreamedModel",
    "cap",
    "footprint",
    "gigabytes",
    "open_model",
    "parse_bytes",
    "peak_rss",
    "pick_device",
    "rss",
    "smallest_cap",
]
