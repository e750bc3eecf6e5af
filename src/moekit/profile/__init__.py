"""Watching a model route: statistics by layer, expert, domain and phase, the file they are kept in, and the report."""

from moekit.profile.degeneracy import Degeneracy
from moekit.profile.document import LEAST_TOKENS, Profile
from moekit.profile.layer import LayerProfile
from moekit.profile.observe import profile
from moekit.profile.schema import DEFAULT, FIELDS, PHASES
from moekit.profile.self_sampling import self_sample, self_sampled_texts
from moekit.profile.statistics import Statistic
from moekit.profile.texts import read_texts
from moekit.profile.trace import Request, RoutingTrace, TraceRecorder, record

__all__ = [
    "DEFAULT",
    "FIELDS",
    "LEAST_TOKENS",
    "PHASES",
    "Degeneracy",
    "LayerProfile",
    "Profile",
    "Request",
    "RoutingTrace",
    "Statistic",
    "TraceRecorder",
    "profile",
    "read_texts",
    "record",
    "self_sample",
    "self_sampled_texts",
]
