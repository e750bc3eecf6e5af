"""The composable MoE language model: every choice of architecture is a named part of its configuration.

Shapes by suffix: B sequences, S positions, H hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..contract import Context
from ..errors import OptionError
from .block import block_of
from .config import MoekitConfig
from .flow import begin, carry, within
from .mixers import ATTENTIONS
from .parts import make, one_model, repeated
from .router import Router
from .sublayers import FEED_FORWARDS
from .wiring import WIRINGS


@dataclass
class MoekitModelOutput(MoeModelOutputWithPast):
    """``losses``: auxiliary terms while training, weighted, summed over layers.

    ``expert_load``: how often each choice of a layer was taken, int64 [E] for each MoE layer in order; ``other_load``:
    the same of routers elsewhere, under "attention" and "memory". Padding does not count.
    """

    losses: dict[str, Tensor] | None = None
    expert_load: tuple[Tensor, ...] | None = None
    other_load: dict[str, list[Tensor]] | None = None


@dataclass
class MoekitOutput(MoeCausalLMOutputWithPast):
    """``loss`` is the cross-entropy plus ``losses``; the rest as the model without its head has it."""

    losses: dict[str, Tensor] | None = None
    expert_load: tuple[Tensor, ...] | None = None
    other_load: dict[str, list[Tensor]] | None = None


class DecoderLayer(GradientCheckpointingLayer):
    """Attention, then an MoE layer or one feed-forward; each reads the normed stream and is wired back into it."""

    def __init__(self, config: MoekitConfig, layer: int) -> None:
        super().__init__()
        site, dense = config.site(layer), layer in (config.dense_layers or ())
        self.block = block_of(config, site)
        self.self_attn = make("attention", ATTENTIONS, config.attention_of(layer), config, layer)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.block.norms == 1:
            self.input_layernorm = nn.Identity()
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        kind = "dense" if dense else config.feed_forward_of(layer)
        self.mlp = make("feed-forward", FEED_FORWARDS, kind, config, layer)
        self.wiring = make("wiring", WIRINGS, "residual" if dense else config.wiring, site, self.mlp)
        self.active = True  # a schedule may leave a layer out

    def forward(self, hidden_states: Tensor, context: Context, **attention: Any) -> tuple[Tensor, Context]:
        """(hidden states, the context for the next layer)."""
        context = within(context)
        attend = partial(self.self_attn, context=context, **attention)
        return self.block(hidden_states, self, attend, context), context


class RotaryEmbedding(nn.Module):
    """(cos, sin) [B, S, D] of positions, for every scaling that transformers knows."""

    inv_freq: Tensor

    def __init__(self, config: MoekitConfig) -> None:
        super().__init__()
        self.config = config
        inv_freq, self.scaling = self.start()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def start(self) -> tuple[Tensor, float]:
        parameters = self.config.rope_parameters or {}
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            return ROPE_INIT_FUNCTIONS[kind](self.config)
        exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.float) / self.config.head_dim
        return 1.0 / parameters.get("rope_theta", 10000.0) ** exponent, 1.0

    def initialise(self, std: float) -> None:
        init.copy_(self.inv_freq, self.start()[0])

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device).float()
        both = torch.cat((angle, angle), dim=-1)
        return (both.cos() * self.scaling).to(hidden_states.dtype), (both.sin() * self.scaling).to(hidden_states.dtype)


class MoekitPreTrainedModel(PreTrainedModel):
    config: MoekitConfig
    config_class = MoekitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"router_logits": OutputRecorder(Router, layer_name="mlp"), "hidden_states": DecoderLayer}
    _keep_in_fp32_modules_strict = {"gate.bias", "threshold", "running_mean", "running_var"}  # moved by small steps

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """What layers have in common is tied whether the embeddings are or not."""
        return super().get_expanded_tied_weights_keys(all_submodels) | repeated(self)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """moekit's kernels, unless others are asked for."""
        return super().get_correct_experts_implementation(requested_experts or "moekit")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initialise"):
            module.initialise(self.config.initializer_range)


class MoekitModel(MoekitPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MoekitConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        with one_model():
            self.layers = nn.ModuleList([DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.memory = None
        if config.memory is not None:
            self.memory = make("memory", FEED_FORWARDS, config.memory, config, config.num_hidden_layers - 1)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._tied_weights_keys = repeated(self)
        self.post_init()

    @property
    def can_cache(self) -> bool:
        """Whether a key-value cache is all that generation must keep (no part says ``cached = False``)."""
        counted = self.layers[0].active  # the cache tells its length by the first layer
        return counted and all(getattr(module, "cached", True) for module in self.modules())

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        modality_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoekitModelOutput:
        """``modality_ids`` and ``task_ids`` [B, S] reach every router's context. An empty batch passes no layer."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not embeds.numel():
            return MoekitModelOutput(self.norm(embeds), past_key_values, losses={}, expert_load=(), other_load={})
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and self.can_cache and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not self.can_cache:
            raise OptionError("a part of this model needs all of the text: run it without past_key_values")
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(embeds.shape[1], device=embeds.device)[None] + past
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        context = self._context(embeds, input_ids, attention_mask, position_ids, modality_ids, task_ids)
        hidden, position = embeds, self.rotary_emb(embeds, position_ids)
        for layer in (layer for layer in self.layers if layer.active):
            hidden, context = layer(
                hidden,
                context,
                position_embeddings=position,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            if self.memory is not None:
                hidden = hidden + remembered(self.memory, hidden, context)
        flow = carry(context)
        return MoekitModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values,
            losses=flow.losses,
            expert_load=tuple(flow.load),
            other_load=flow.other_load,
        )

    def _context(self, embeds: Tensor, ids: Any, mask: Any, position: Tensor, modality: Any, task: Any) -> Context:
        batch, length = embeds.shape[:2]
        padding = None
        if mask is not None and mask.dim() == 2:
            padding = (mask[:, -length:] == 0).reshape(-1)
        starts = self.config.modality_starts
        if modality is None and ids is not None and starts is not None:
            modality = torch.bucketize(ids, torch.tensor(starts, device=ids.device), right=True)
        flat = {"input_ids": ids, "modality": modality, "task": task, "position": position.expand(batch, -1)}
        return begin(
            batch,
            length,
            embeds.device,
            padding=padding,
            **{name: None if value is None else value.reshape(-1) for name, value in flat.items()},
        )


def remembered(memory: nn.Module, hidden_BSH: Tensor, context: Context) -> Tensor:
    """What a memory after a layer adds; its load is told apart from those of layers."""
    flow = carry(context)
    layers = len(flow.load)
    added = memory(hidden_BSH, context)
    flow.other_load.setdefault("memory", []).extend(flow.load[layers:])
    del flow.load[layers:]
    return added


class MoekitForCausalLM(MoekitPreTrainedModel, GenerationMixin):
    """The decoder and its head. ``loss`` includes the balance terms while training."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoekitConfig) -> None:
        super().__init__(config)
        self.model = MoekitModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoekitOutput:
        """``labels`` are shifted here, as everywhere in transformers; -100 is left out, and one token alone costs 0."""
        number = kwargs.pop("num_items_in_batch", None)
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            extra = {} if number is None else {"num_items_in_batch": number}
            told = logits.numel() and labels.shape[-1] > 1  # without a second token there is nothing to get wrong
            loss = self.loss_function(logits, labels, self.config.vocab_size, **extra) if told else logits.sum() * 0
            loss = loss + sum(out.losses.values())
        return MoekitOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
            losses=out.losses,
            expert_load=out.expert_load,
            other_load=out.other_load,
        )

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """As in transformers; a model that cannot cache runs the text anew for every token."""
        return super().generate(*inputs, **kwargs if self.model.can_cache else {**kwargs, "use_cache": False})


AutoModel.register(MoekitConfig, MoekitModel, exist_ok=True)
AutoModelForCausalLM.register(MoekitConfig, MoekitForCausalLM, exist_ok=True)
