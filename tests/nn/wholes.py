"""A part in a whole model: what every part must get through."""

from typing import Any

import torch

from moekit.nn import MoekitConfig, MoekitForCausalLM, finish_step

SIZES = {"vocab_size": 40, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 4}


def tiny(seed: int = 0, **fields: Any) -> MoekitForCausalLM:
    """Random, in float32, its weights large enough that routing matters."""
    torch.manual_seed(seed)
    return MoekitForCausalLM(MoekitConfig(**{**SIZES, "initializer_range": 0.2, **fields})).eval()


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def leaks(model: MoekitForCausalLM, at: int = 7, **inputs: Any) -> bool:
    """Whether a changed token changes any output before it."""
    ids = tokens()
    other = ids.clone()
    other[:, at:] = (other[:, at:] + 1 + tokens(seed=2)[:, at:] % 38) % 40
    with torch.no_grad():
        before, after = (model(each, use_cache=False, **inputs).logits[:, :at] for each in (ids, other))
    return not torch.allclose(before, after, atol=1e-6)


def lives(tmp_path: Any, idle: tuple[str, ...] = (), inputs: Any = None, **fields: Any) -> MoekitForCausalLM:
    """Train one step, save, reload, generate; returns the model. ``idle``: parameters no gradient may reach."""
    model, inputs = tiny(**fields), inputs or {}
    ids = tokens()
    model.train()
    loss = model(ids, labels=ids, **inputs).loss
    assert loss.isfinite()
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not [name for name in still if not any(part in name for part in idle)], still
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    finish_step(model)
    model.eval()
    model.save_pretrained(tmp_path)
    again = MoekitForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(ids, **inputs).logits
        assert torch.equal(again(ids, **inputs).logits, expected)
        if not inputs:
            cached = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
            plain = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
            assert torch.equal(cached, plain)
        half = MoekitForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert half(ids, **inputs).logits.isfinite().all()
        assert half(ids[:1, :1], **{name: value[:1, :1] for name, value in inputs.items()}).logits.isfinite().all()
    return model


def padding_on_the_left_changes_nothing(model: MoekitForCausalLM) -> None:
    """What is said of six tokens is said of them behind three of padding too."""
    ids, mask = tokens(1, 6), torch.tensor([[0] * 3 + [1] * 6])
    padded = torch.cat((torch.full((1, 3), 7), ids), dim=1)
    with torch.no_grad():
        out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
        torch.testing.assert_close(out, model(ids).logits, rtol=1e-4, atol=1e-4)
