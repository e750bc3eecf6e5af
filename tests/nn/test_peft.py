"""PEFT's adapters on our models: on projections by module, on stacked experts by parameter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from wholes import tiny, tokens

WHERE = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("where", WHERE)
def test_adapters_start_as_nothing_learn_and_are_merged(where, tmp_path):
    model, ids = tiny(), tokens()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **WHERE[where]))
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(input_ids=ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        after = adapted.eval()(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, after)
        torch.testing.assert_close(again.merge_and_unload()(ids).logits, after)
