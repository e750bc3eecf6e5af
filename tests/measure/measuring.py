"""A byte tokenizer, a tiny random model, and a runner that counts how many batches of logits are alive."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config


class ByteTokenizer:
    """One token per byte; ids 0 and 1 are padding and (on request) beginning of sequence."""

    is_fast = False
    pad_token_id = 0

    def __init__(self, bos=False):
        self.bos_token_id = 1 if bos else None

    def __call__(self, text, add_special_tokens=False, **_):
        begin = [1] if add_special_tokens and self.bos_token_id else []
        return {"input_ids": begin + [byte + 2 for byte in text.encode()]}


class Loaded:
    """A model in memory."""

    def __init__(self, model):
        self.model, self.alive = model, 0

    def forward(self, batches):
        for batch in batches:
            self.alive += 1
            yield self.model(**batch).logits


class Fixed:
    """Made-up logits, one tensor per batch."""

    model = None

    def __init__(self, logits):
        self.logits = logits

    def forward(self, batches):
        yield from self.logits[: len(batches)]


def make_model(seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=258, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # sharper than at initialisation, so that greedy decoding is not a matter of rounding
        model.transformer.wte.weight.mul_(20)
    return model
