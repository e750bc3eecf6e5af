"""The configuration of a composable MoE language model: sizes, and the names of its parts."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import AutoConfig

from ..errors import OptionError
from .depth import per_layer
from .parts import Site, fits

_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 1,
    "shared_expert_intermediate_size": 0,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "layers_per_bank": 1,
    "max_position_embeddings": 1,
    "initializer_range": 0,
    "rms_norm_eps": 0,
}


@strict
class MoekitConfig(PreTrainedConfig):
    """Sizes as in stock families. What differs from layer to layer is a list with one entry per layer; for numbers of
    experts also a rule over depth (``{kind = "descending", low = 8, high = 24}``, see ``nn.depth``).

    ``experts`` names the kind of bank that holds a layer's experts; ``layers_per_bank`` neighbours choose from all of
    theirs, held in one bank. ``router`` names the router's parts (see ``nn.router``), ``balance`` its auxiliary terms
    ({name: {weight, options}}), ``correction`` the loss-free bias; ``others`` lists experts of other kinds (``["zero",
    "copy"]``); ``dense_layers`` have one feed-forward of ``intermediate_size`` instead, other kinds of sublayer are
    named by ``feed_forward``; ``memory`` is one sublayer that every layer is followed by; ``attention``, ``block``
    and ``wiring`` name those parts. ``modality_starts`` are the first token ids of modalities 1, 2, ..., for models
    whose modalities have vocabularies of their own; ids that are given (``modality_ids``) come first. Parts are named
    as :mod:`moekit.nn.parts` says.
    """

    model_type = "moekit"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 1024
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 0
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    num_experts: int | list[int] | dict = 16
    num_experts_per_tok: int | list[int] | dict = 2
    experts: str | dict = "stacked"
    layers_per_bank: int = 1
    dense_layers: list[int] | None = None
    others: list[str | dict] | None = None
    router: dict | None = None
    balance: dict | None = None
    correction: dict | None = None
    wiring: str | dict = "residual"
    block: str | dict = "sequential"
    feed_forward: str | dict | list = "moe"
    memory: str | dict | None = None
    attention: str | dict | list = "softmax"
    modality_starts: list[int] | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        self._check()
        for name in ("num_experts", "num_experts_per_tok"):
            if isinstance(rule := getattr(self, name), dict):
                setattr(self, name, per_layer(rule, self.num_hidden_layers))
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        """OptionError for sizes that no model has, or that do not fit together."""
        size: dict[str, Any] = {name: getattr(self, name) for name in _LEAST}
        for name, least in _LEAST.items():
            if not size[name] >= least:
                raise OptionError(f"{name}={size[name]}: give {least} or more")
        heads, groups = size["num_attention_heads"], size["num_key_value_heads"]
        if heads % groups:
            raise OptionError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
        if size["head_dim"] % 2:
            raise OptionError(f"head_dim={self.head_dim} must be even: rotary positions turn halves of a head")
        if self.hidden_act not in ACT2FN:
            raise OptionError(f"hidden_act={self.hidden_act!r} is not known: choose one of {', '.join(sorted(ACT2FN))}")
        if any(not 0 <= layer < self.num_hidden_layers for layer in self.dense_layers or ()):
            raise OptionError(
                f"dense_layers={self.dense_layers}: the {self.num_hidden_layers} layers have the numbers from 0 to "
                f"{self.num_hidden_layers - 1}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise OptionError(f"pad_token_id={self.pad_token_id} is not among the {self.vocab_size} tokens there are")
        starts = self.modality_starts or []
        if starts != sorted({start for start in starts if 0 <= start < self.vocab_size}):
            raise OptionError(f"modality_starts={starts}: give rising ids of the {self.vocab_size} tokens there are")
        self._check_rope(self.rope_parameters or {})

    @staticmethod
    def _check_rope(told: dict[str, Any]) -> None:
        kind = told.get("rope_type", "default")
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise OptionError(f"rope_type={kind!r}: choose one of default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
        for name in ("rope_theta", "factor"):
            if name in told and not (fits(told[name], float) and told[name] > 0):
                raise OptionError(f"{name}={told[name]!r} of rotary positions: give a positive number")

    def site(self, layer: int) -> Site:
        """What the parts of one MoE layer are told about it.

        Raises :class:`OptionError` for sizes that do not fit together.
        """
        experts = sum(self._at("num_experts", other) for other in self.bank_layers(layer))
        return Site(
            hidden_size=self.hidden_size,
            intermediate_size=self.moe_intermediate_size,
            num_experts=experts,
            top_k=self._at("num_experts_per_tok", layer),
            choices=experts + len(self.others or ()),
            layer=layer,
            num_layers=self.num_hidden_layers,
            vocab_size=self.vocab_size,
            activation=self.hidden_act,
        )

    def bank_layers(self, layer: int) -> list[int]:
        """The MoE layers that choose from the same experts as ``layer``, neighbours all."""
        size = self.layers_per_bank
        group = range(layer - layer % size, min(layer - layer % size + size, self.num_hidden_layers))
        return [other for other in group if other == layer or self._has_experts(other)]

    def _has_experts(self, layer: int) -> bool:
        spec = self.feed_forward_of(layer)
        kind = spec.get("kind") if isinstance(spec, dict) else spec
        return kind == "moe" and layer not in (self.dense_layers or ())

    @property
    def expert_step(self) -> int:
        """What numbers of experts must stay multiples of: the groups that a router chooses from."""
        select = (self.router or {}).get("select")
        groups = select.get("groups", 1) if isinstance(select, dict) else 1
        return groups if isinstance(groups, int) and groups > 0 else 1

    def attention_of(self, layer: int) -> str | dict:
        """The kind of attention of a layer."""
        return self._at("attention", layer)

    def feed_forward_of(self, layer: int) -> str | dict:
        """The kind of what follows attention in a layer."""
        return self._at("feed_forward", layer)

    def _at(self, name: str, layer: int) -> Any:
        value = getattr(self, name)
        if not isinstance(value, list):
            return value
        if len(value) != self.num_hidden_layers:
            raise OptionError(f"{name} lists {len(value)} layers, and the model has {self.num_hidden_layers}")
        return value[layer]


AutoConfig.register(MoekitConfig.model_type, MoekitConfig, exist_ok=True)
