"""Mechanisms on expert weights and scores that several wings share; no paper's name in here.

| part | what it does |
| --- | --- |
| `align` | order hidden units alike, one to one (Hungarian) |
| `allocate` | least loss under a byte budget, exactly, with the whole curve |
| `basis` | low rank alone, or with an output or an input basis shared by several matrices; whitening |
| `bits` | one width per expert under a budget of bits, exactly, with demands |
| `cluster` | similarities of experts; joining each to a leader, k-means on outputs, spectral, pooled budgets |
| `gptq` | rounding with error feedback, any grid, all experts of a layer |
| `grids` | asymmetric, symmetric, binary and ternary grids; rounding to nearest |
| `moments` | second moments of inputs, token weights, damped inverse factors |
| `neurons` | handing single neurons of dropped experts to the most similar kept ones; merging their pools |
| `outliers` | experts that make massive activations; scales that smooth outlier channels |
| `planes` | a low-bit base and sign planes on top, one bit each |
| `rank` | the best of a layer's experts by a score |
| `stored` | from rounded weights to what the bank formats take |
"""

from moekit.algebra.align import align, alignment
from moekit.algebra.allocate import Allocation, allocate, frontiers
from moekit.algebra.basis import (
    LowRank,
    SharedColumns,
    SharedRows,
    low_rank,
    low_rank_parameters,
    shared_columns,
    shared_columns_parameters,
    shared_rows,
    shared_rows_parameters,
)
from moekit.algebra.bits import allocate_bits
from moekit.algebra.cluster import (
    Clustering,
    assign_to_leaders,
    cosine_of_gram,
    kmeans,
    mean_cosine,
    objective_curve,
    pooled_counts,
    spectral,
    token_grams,
)
from moekit.algebra.gptq import GptqReport, gptq
from moekit.algebra.grids import (
    Asymmetric,
    Grid,
    Rounded,
    Symmetric,
    TernaryAbsmean,
    TernaryMinMax,
    round_to_nearest,
)
from moekit.algebra.moments import second_moments, weighted_error
from moekit.algebra.neurons import NeuronMap, assign_neurons, merge_neurons
from moekit.algebra.outliers import channel_peaks, outlier_scales, smoothing_scales
from moekit.algebra.planes import Planes, nested
from moekit.algebra.rank import best, share_to_count
from moekit.algebra.stored import as_codes, as_planes, as_ternary

__all__ = [
    "Allocation",
    "Asymmetric",
    "Clustering",
    "GptqReport",
    "Grid",
    "LowRank",
    "NeuronMap",
    "Planes",
    "Rounded",
    "SharedColumns",
    "SharedRows",
    "Symmetric",
    "TernaryAbsmean",
    "TernaryMinMax",
    "align",
    "alignment",
    "allocate",
    "allocate_bits",
    "as_codes",
    "as_planes",
    "as_ternary",
    "assign_neurons",
    "assign_to_leaders",
    "best",
    "channel_peaks",
    "cosine_of_gram",
    "frontiers",
    "gptq",
    "kmeans",
    "low_rank",
    "low_rank_parameters",
    "mean_cosine",
    "merge_neurons",
    "nested",
    "objective_curve",
    "outlier_scales",
    "pooled_counts",
    "round_to_nearest",
    "second_moments",
    "share_to_count",
    "shared_columns",
    "shared_columns_parameters",
    "shared_rows",
    "shared_rows_parameters",
    "smoothing_scales",
    "spectral",
    "token_grams",
    "weighted_error",
]
