"""What is trained and how: one frozen record for each of the two embedded models."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from moekit.lab._tokens import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE


@dataclass(frozen=True, kw_only=True)
class Phase:
    """From `start` on: the share of each domain, the weight of the balance term in each layer, and `unaligned`.

    That is the share of task rows that begin in the middle of an example, as windows of a text do; the others begin
    with a whole prompt.
    """

    start: int
    balance: float
    mixture: dict[str, float]
    unaligned: float = 0.0


# First even routing and the easy tasks; then room for experts to specialise, and more of what is learnt slowly.
PHASES = (
    Phase(
        start=0,
        balance=0.005,
        mixture={
            "python": 0.20,
            "prose": 0.13,
            "c": 0.13,
            "licences": 0.04,
            "arithmetic": 0.10,
            "sorting": 0.08,
            "reversing": 0.08,
            "brackets": 0.07,
            "translation": 0.09,
            "facts": 0.06,
            "abstain": 0.02,
        },
    ),
    Phase(
        start=1200,
        balance=0.001,
        mixture={
            "python": 0.18,
            "prose": 0.11,
            "c": 0.11,
            "licences": 0.03,
            "arithmetic": 0.16,
            "sorting": 0.06,
            "reversing": 0.05,
            "brackets": 0.05,
            "translation": 0.12,
            "facts": 0.11,
            "abstain": 0.02,
        },
    ),
    Phase(
        start=2600,
        balance=0.001,
        unaligned=0.5,
        mixture={
            "python": 0.15,
            "prose": 0.09,
            "c": 0.09,
            "licences": 0.03,
            "arithmetic": 0.22,
            "sorting": 0.03,
            "reversing": 0.03,
            "brackets": 0.04,
            "translation": 0.20,
            "facts": 0.10,
            "abstain": 0.02,
        },
    ),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes, curriculum and schedule. A batch always holds `tokens_per_step` tokens, whatever the context."""

    kind: str = "moe"
    hidden_size: int = 192
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    num_experts: int = 16
    top_k: int = 4
    intermediate_size: int = 64

    steps: int = 3200
    tokens_per_step: int = 4096
    context: int = 256
    long_context: int = 512
    long_share: float = 0.15
    learning_rate: float = 2.5e-3
    warmup: int = 100
    decay_share: float = 0.5
    weight_decay: float = 0.1
    prompt_weight: float = 0.2
    seed: int = 0
    phases: tuple[Phase, ...] = PHASES

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
        left = (self.steps - step) / (self.decay_share * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)

    def phase_at(self, step: int) -> Phase:
        """Return the last phase begun by a step."""
        return [phase for phase in self.phases if phase.start <= step][-1]

    def context_at(self, step: int) -> int:
        """Context length: short at first, the full length for the last `long_share` of the steps."""
        return self.long_context if step >= (1 - self.long_share) * self.steps else self.context

    def config(self) -> PretrainedConfig:
        """Return the stock configuration; the dense sibling has one MLP as wide as the active experts together."""
        from transformers import Qwen3Config, Qwen3MoeConfig

        shared = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size * self.top_k,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "max_position_embeddings": self.long_context,
            "tie_word_embeddings": True,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
        }
        if self.kind == "dense":
            return Qwen3Config(**shared)
        return Qwen3MoeConfig(
            **shared,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.intermediate_size,
            norm_topk_prob=True,
            router_aux_loss_coef=self.phases[-1].balance,
        )


# The sibling trains half as long, on the last mixture from the start.
_DENSE = Recipe(kind="dense", steps=1000, phases=(replace(PHASES[-1], start=0),))
RECIPES = {"moe": Recipe(), "dense": _DENSE}
