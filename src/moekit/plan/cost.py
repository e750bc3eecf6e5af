"""What keeping an expert costs in bytes and what losing it, or some of its bits, costs in loss.

The unit of loss is *disturbance*: the energy of the error a change puts into a layer's output, as a share of the
energy of the residual stream behind it, per token. Dropping expert e disturbs by its weighted output energy and
by about as much again from whatever serves its tokens instead; rounding it disturbs by its share of the layer's energy
(``rounding_share``) times the squared relative error of its rounded output. What a low rank leaves out of it is missing
as a dropped expert's output is, though nothing comes in its place. Disturbances of different experts and layers are
taken to be independent, so they add; how many nats one unit costs in each layer is measured where the model can run
(``calibrate``).
Shapes by suffix: E experts, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moekit.algebra import cosine_of_gram
from moekit.bank import ExpertBank
from moekit.contract import Routing
from moekit.formats import DenseBank, PackedBank, packed_nbytes
from moekit.kernels import run
from moekit.plan.low_rank import Rank, factor_nbytes, matrices, truncated
from moekit.plan.planner import Site

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, MoELayer
    from moekit.profile import LayerProfile

Precision = tuple[int, int]
"""(bits, group size); 16 bits is the source's own."""
Form = Precision | Rank
"""One way to store an expert."""
WHOLE: Precision = (16, 64)
PRECISIONS: tuple[Precision, ...] = (
    WHOLE,
    *((8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128), (3, 32), (3, 64), (3, 128), (2, 32), (2, 64), (2, 128)),
)
HEADER_ENTRY = 105
"""Bytes that a tensor's entry in a safetensors header takes besides its module's name: the rest of the name, dtype,
shape and offsets."""
REROUTED = 2.0
"""Dropping an expert removes its output and adds another's in its place: two errors of about one size."""
SAMPLED_EXPERTS, SAMPLED_TOKENS, SAMPLED_WEIGHTS = 4, 64, 32_000_000
"""Above so many weights in a layer, rounding is tried on a few experts and their mean error stands for all."""


@dataclass(frozen=True)
class LayerCost:
    """One layer: ``drop`` [E] and ``noise[form]`` [E] in disturbance (a rank's is output that is missing, and weighs as
    dropping does), ``nbytes[form]`` of one stored expert, ``scores`` [E] by the name of the ranking, ``row_nbytes`` of
    one router row of the output. For merging: ``usage`` [E] and the ``similarity`` [E, E] of router logits, None where
    the profile has none. ``bank`` reads experts, for the forms whose numbers are computed."""

    site: Site
    drop: np.ndarray
    noise: Mapping[Form, np.ndarray]
    nbytes: Mapping[Form, int]
    row_nbytes: int
    scores: Mapping[str, np.ndarray]
    usage: np.ndarray
    similarity: np.ndarray | None
    bank: Callable[[Sequence[int]], DenseBank] | None = None

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(form for form in self.nbytes if isinstance(form, Rank))

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return tuple(form for form in self.nbytes if not isinstance(form, Rank))


def layer_cost(
    checkpoint: Checkpoint,
    layer: MoELayer,
    seen: LayerProfile,
    precisions: Sequence[Precision] = PRECISIONS,
    *,
    ranks: Sequence[Rank] = (),
    weights: bool = True,
) -> LayerCost:
    """The costs of one layer. ``weights`` False (headers only) takes the rounding error of normally distributed
    weights instead of the layer's own, and no ``ranks``: what those lose is only in the weights."""
    energy_E, share_E = seen.total("output_energy"), rounding_share(seen)
    missing_E = energy_E / _stream_energy(seen, energy_E)
    if weights:
        tried = tried_experts(layer)
        bank, inputs = checkpoint.bank(layer.name, experts=tried), _inputs(seen)
        found = rounding_errors(bank, precisions, inputs) | rank_errors(bank, ranks, inputs)
        whole = len(tried) == layer.num_experts
        error = {form: e if whole else np.full(layer.num_experts, e.mean()) for form, e in found.items()}
    else:
        error = {p: np.full(layer.num_experts, expected_error(*p)) for p in precisions}
    return LayerCost(
        site=Site(layer.name, layer.num_experts, layer.top_k, layer.groups),
        drop=REROUTED * missing_E,
        noise={form: (missing_E if isinstance(form, Rank) else share_E) * error[form] for form in error},
        nbytes=expert_nbytes(checkpoint, layer, list(error)),
        row_nbytes=row_nbytes(checkpoint, layer),
        scores=rankings(seen),
        usage=seen.total("counts"),
        similarity=cosine_of_gram(seen.logit_gram) if "logit_gram" in seen.arrays else None,
        bank=lambda experts: checkpoint.bank(layer.name, experts=list(experts)),
    )


def rounding_share(seen: LayerProfile) -> np.ndarray:
    """What each expert's rounding counts [E]: the share of the stream's energy that the layer's experts add, dealt
    to them by the sums of their weighted output norms.

    By the squares of the norms, the experts of a few tokens of huge norm would look like all that counts, but there the
    stream is as huge, and a relative error lost in it. On the embedded model, a quarter of the experts by energy then
    cost six times the nats per unit of the last quarter; by norms, twice.
    """
    energy_E = seen.total("output_energy")
    weigh_E = seen.total("gate_norm") if "gate_norm" in seen.arrays else energy_E
    return float(energy_E.sum()) / _stream_energy(seen, energy_E) * weigh_E / max(float(weigh_E.sum()), 1e-30)


def stored_cost(checkpoint: Checkpoint, layer: MoELayer, cost: LayerCost) -> LayerCost:
    """The same layer where experts may only be kept as the source stores them, or dropped."""
    names = [name for tensor in layer.expert_tensors for name in tensor.stored.tensors.values()]
    each = -(-sum(checkpoint.tensors[name].nbytes for name in names) // layer.num_experts)
    return replace(cost, nbytes={WHOLE: each}, noise={WHOLE: np.zeros(layer.num_experts)})


def rankings(seen: LayerProfile) -> dict[str, np.ndarray]:
    """Ways to say which experts matter, best first by the score [E]; those the profile has the statistics for."""
    found = {"output energy": seen.total("output_energy")}
    for name, statistic in (
        ("token contribution", "contribution"),
        ("gate x output norm", "gate_norm"),
        ("frequency", "counts"),
        ("router probability", "probability"),
    ):
        if statistic in seen.arrays:
            found[name] = seen.total(statistic)
    if "gate_norm" in seen.arrays:
        found["mean gate x output norm"] = np.nan_to_num(seen.per_token("gate_norm"))
    return found


def expert_nbytes(checkpoint: Checkpoint, layer: MoELayer, forms: Sequence[Form]) -> dict[Form, int]:
    """Bytes of one expert in the output, its entries in the files' headers included (to within a few bytes each); at
    16 bits, decoded if the source stores it quantised."""
    shape = layer.shape
    dtype = float_dtype(checkpoint, layer)
    sizes: dict[Form, int] = {}
    for form in forms:
        if isinstance(form, Rank):
            data, entries = factor_nbytes(layer, form, dtype), 2 * matrices(layer)
        else:
            kind = shape.gated, shape.biased, dtype
            data = packed_nbytes(shape.hidden_size, shape.intermediate_size, *form, *kind)
            entries = 2 if form[0] == 16 else 6
        sizes[form] = data + (entries + 2 * shape.biased) * (len(layer.name) + HEADER_ENTRY)
    return sizes


def row_nbytes(checkpoint: Checkpoint, layer: MoELayer) -> int:
    """Bytes of one router row, biases included."""
    infos = [(checkpoint.tensors[row.name], row) for row in layer.row_tensors]
    return sum(info.nbytes // info.shape[row.axis] for info, row in infos)


def float_dtype(checkpoint: Checkpoint, layer: MoELayer) -> torch.dtype:
    """The dtype of the layer's experts once decoded."""
    dtype = checkpoint.tensors[layer.expert_tensors[0].name].dtype
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else checkpoint.scheme.dtype


def rounding_errors(
    bank: DenseBank, precisions: Sequence[Precision], x_TH: torch.Tensor | None = None
) -> dict[Form, np.ndarray]:
    """Squared relative error [E] of each expert's output when its weights are rounded, on inputs x_TH (or noise)."""
    bank = _wide(bank)
    made = ((p, PackedBank.quantise(bank, *p).dequantise()) for p in precisions)
    return dict(_errors(bank, made, x_TH))


def rank_errors(bank: DenseBank, ranks: Sequence[Rank], x_TH: torch.Tensor | None = None) -> dict[Form, np.ndarray]:
    """The same when its matrices are cut to a rank."""
    bank = _wide(bank)
    return dict(_errors(bank, truncated(bank, ranks), x_TH))


def _wide(bank: DenseBank) -> DenseBank:
    return replace(bank, **{name: tensor.float() for name, tensor in bank.tensors().items()})


def _errors(
    bank: DenseBank, made: Iterable[tuple[Form, ExpertBank]], x_TH: torch.Tensor | None
) -> Iterator[tuple[Form, np.ndarray]]:
    """Of every bank made of this one."""
    if x_TH is None:
        x_TH = torch.randn(SAMPLED_TOKENS, bank.hidden_size, generator=torch.Generator().manual_seed(0))
    before_TEH = _outputs(bank, x_TH)
    energy_E = before_TEH.square().sum((0, 2)).clamp(min=1e-30)
    for form, other in made:
        yield form, ((_outputs(other, x_TH) - before_TEH).square().sum((0, 2)) / energy_E).double().numpy()


def _outputs(bank: ExpertBank, x_TH: torch.Tensor) -> torch.Tensor:
    """[T, E, H]: what every expert returns for every token."""
    all_TE = torch.arange(bank.num_experts).expand(len(x_TH), -1)
    return run(bank, x_TH, Routing(all_TE, torch.ones(all_TE.shape)))


def tried_experts(layer: MoELayer) -> list[int]:
    """The experts whose rounding is tried: all of a small layer, a few spread over a large one."""
    shape = layer.shape
    size = (3 if shape.gated else 2) * shape.hidden_size * shape.intermediate_size
    if size * layer.num_experts <= SAMPLED_WEIGHTS:
        return list(range(layer.num_experts))
    return np.linspace(0, layer.num_experts - 1, min(SAMPLED_EXPERTS, layer.num_experts)).astype(int).tolist()


def expected_error(bits: int, group: int) -> float:
    """The same for normally distributed weights: uniform noise of one step in each of three matrices."""
    if bits == 16:
        return 0.0
    spread = 2 * np.sqrt(2 * np.log(max(group, 2))) * 0.83  # expected range of `group` normal draws, in deviations
    return float(3 * (spread / (2**bits - 1)) ** 2 / 12)


def _stream_energy(seen: LayerProfile, energy_E: np.ndarray) -> float:
    """Summed energy of the residual stream behind the layer: what came in, where the profile has it, and what the
    experts add (in early layers often the larger part)."""
    came = float(seen.total("residual_energy")) if "residual_energy" in seen.arrays else 0.0
    return max(came + float(energy_E.sum()), 1e-30)


def _inputs(seen: LayerProfile) -> torch.Tensor | None:
    if "hidden" not in seen.arrays or not len(seen.hidden):
        return None
    step = max(1, len(seen.hidden) // SAMPLED_TOKENS)
    return torch.from_numpy(np.ascontiguousarray(seen.hidden[::step][:SAMPLED_TOKENS])).float()
