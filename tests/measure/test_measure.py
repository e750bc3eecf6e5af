"""Bits per byte, divergence and exact match against slow and independent computations."""

import math

import pytest
import torch
from measuring import ByteTokenizer, Fixed, Loaded, make_model

from moekit.errors import TextError
from moekit.measure import bits_per_byte, compare, exact_match, together, windows

TEXT = "Sphinx of black quartz, judge my vow. " * 4


@torch.no_grad()
def slow_nats(model, ids):
    """Each next token on its own, no batch, no padding."""
    total = 0.0
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    for position, target in enumerate(ids[1:]):
        total -= float(logits[position].log_softmax(-1)[target])
    return total


def test_uniform_logits_cost_the_log_of_the_vocabulary(tokenizer):
    runner = Fixed([torch.zeros(1, 11, 258)])
    score = bits_per_byte(runner, ["hello world"], tokenizer)["text"]
    assert score.mean == pytest.approx(math.log2(258))


def test_bits_per_byte_per_domain_equals_the_slow_way(tokenizer, runners):
    texts = {"a": [TEXT, "short one"], "b": ["another domain, with other words"]}
    scores = bits_per_byte(runners[0], texts, tokenizer, length=32, batch_size=3)
    for name, lines in texts.items():
        cut = windows(lines, tokenizer, length=32, batch_size=1)
        nats = sum(slow_nats(runners[0].model, batch["input_ids"][0].tolist()) for batch in cut.batches)
        size = sum(len(line.encode()) - 1 for line in lines)
        assert sum(cut.num_bytes) == size
        assert scores[name].mean == pytest.approx(nats / math.log(2) / size, rel=1e-6)
        assert scores[name].low <= scores[name].mean <= scores[name].high


def test_windows_predict_every_token_but_the_first_once(tokenizer):
    cut = windows(["abcdefghij"], tokenizer, length=4, batch_size=2)
    rows = [(row, mask) for b in cut.batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    seen = [row[mask.bool()].tolist() for row, mask in rows]
    assert [token for row in seen for token in row[1:]] == [byte + 2 for byte in b"bcdefghij"]
    assert cut.num_bytes == (3.0, 3.0, 3.0)


def test_a_beginning_token_makes_the_first_byte_count():
    cut = windows(["abcdefghij"], ByteTokenizer(bos=True), length=6)
    assert sum(cut.num_bytes) == 10


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_text_without_anything_to_predict_is_refused(tokenizer, runners, texts):
    with pytest.raises(TextError, match="domain 'poems' has nothing to predict"):
        bits_per_byte(runners[0], {"poems": texts}, tokenizer)


def test_compare_with_itself_is_exactly_zero(tokenizer, runners):
    result = compare(runners[0], runners[0], windows([TEXT], tokenizer, length=40))
    assert result.kl.mean == 0.0
    assert result.agreement.mean == 1.0
    assert result.bits_per_byte_a == result.bits_per_byte_b


def test_compare_equals_the_slow_way(tokenizer, runners):
    a, b = runners
    cut = windows([TEXT, "shorter text"], tokenizer, length=32, batch_size=4)
    kl, agree, tokens = 0.0, 0, 0
    for batch in windows([TEXT, "shorter text"], tokenizer, length=32, batch_size=1).batches:
        p, q = (runner.model(**batch).logits[0, :-1].double() for runner in (a, b))
        kl += float(torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"))
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    result = compare(a, b, cut)
    assert result.tokens == tokens
    assert result.kl.mean == pytest.approx(kl / tokens, rel=1e-5)
    assert result.kl.mean > 0.1
    assert result.agreement.mean == pytest.approx(agree / tokens)
    alone = bits_per_byte(a, [TEXT, "shorter text"], tokenizer, length=32)["text"]
    assert result.bits_per_byte_a.mean == pytest.approx(alone.mean)
    assert set(result.as_dict()) >= {"kl", "agreement", "bits_per_byte_source", "bits_per_byte_output", "tokens"}


def test_each_domain_is_compared_as_if_it_were_alone(tokenizer, runners):
    parts = {
        name: windows(lines, tokenizer, length=32) for name, lines in {"a": [TEXT], "b": [TEXT[9:], "x y"]}.items()
    }
    whole = together(parts)
    assert len(whole) == len(whole.domains) == sum(map(len, parts.values()))
    assert whole.domains.count("b") == len(parts["b"])
    result = compare(*runners, whole)
    alone = {name: compare(*runners, part) for name, part in parts.items()}
    for name, one in alone.items():
        assert result.domains[name].tokens == one.tokens
        assert result.domains[name].kl.mean == pytest.approx(one.kl.mean, rel=1e-6)
        assert result.domains[name].bits_per_byte_b.mean == pytest.approx(one.bits_per_byte_b.mean, rel=1e-6)
        assert not one.domains
    assert result.kl.mean == pytest.approx(sum(o.kl.mean * o.tokens for o in alone.values()) / result.tokens)
    told = result.as_dict()
    assert set(told["domains"]) == {"a", "b"}
    assert told["domains"]["a"]["agreement_low"] <= told["domains"]["a"]["agreement"]
    assert told["bits_per_byte_source_low"] <= told["bits_per_byte_source"] <= told["bits_per_byte_source_high"]


def test_domains_take_turns_so_that_a_beginning_has_all_of_them(tokenizer):
    long, short = windows([TEXT * 9], tokenizer, length=16, batch_size=2), windows([TEXT], tokenizer, batch_size=2)
    both = together({"long": long, "short": short})
    assert both.domains[:3] == ("long", "long", "short")
    assert sum(both.num_bytes) == pytest.approx(sum(long.num_bytes) + sum(short.num_bytes))


def test_what_padding_holds_does_not_matter(tokenizer, runners):
    a, b = runners
    batch = windows(["a longer line of text", "short"], tokenizer).batches[0]
    dirty = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 77)}
    clean, changed = compare(a, b, [batch]), compare(a, b, [dirty])
    assert clean.tokens == changed.tokens == 20 + 4
    assert clean.kl.mean == pytest.approx(changed.kl.mean, rel=1e-6)


def test_impossible_tokens_of_the_reference_add_nothing():
    p, q = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    p[..., 0] = q[..., 0] = -torch.inf
    result = compare(Fixed([p]), Fixed([q]), [{"input_ids": torch.tensor([[1, 2]])}])
    assert result.kl.mean == 0.0
    assert result.bits_per_byte_a is None


def test_logits_are_consumed_batch_by_batch(tokenizer):
    a, b = Loaded(make_model(0)), Loaded(make_model(1))
    ahead = []

    class Watching:
        model = None

        def forward(self, batches):
            for batch in batches:
                ahead.append(a.alive - len(ahead))
                yield b.model(**batch).logits

    compare(a, Watching(), windows([TEXT], tokenizer, length=20, batch_size=1))
    assert set(ahead) == {1}


def test_models_of_different_vocabularies_cannot_be_compared():
    batch = {"input_ids": torch.tensor([[1, 2]])}
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(Fixed([torch.zeros(1, 2, 4)]), Fixed([torch.zeros(1, 2, 5)]), [batch])
    with pytest.raises(ValueError, match="no token to predict"):
        compare(Fixed([]), Fixed([]), [])


def test_exact_match_equals_greedy_decoding(tokenizer, runners):
    """Answers that the model itself gives, some of them spoilt: the verdict of decoding token by token, one by one."""
    model = runners[0].model
    examples, verdicts = [], []
    for i, prompt in enumerate(["add: 1+2=", "sort: bca=", "x", "rev: hello=", "close: ((="]):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        said = [max(token - 2, 0) for token in out[0, ids.shape[1] :].tolist()]
        if i % 2:
            said[1] = (said[1] + 1) % 128
        if any(byte > 127 for byte in said):
            continue
        answer = bytes(said[:3]).decode()
        stop = bytes(said[3:]).decode()
        verdicts.append(exact_match(runners[0], tokenizer, [(prompt, answer)], stop=stop).mean)
        examples.append(i % 2)
    assert len(verdicts) >= 3
    assert verdicts == [1.0 - spoilt for spoilt in examples]


def test_exact_match_counts_in_batches_of_unequal_length(tokenizer):
    """A made-up model that always says `ab` and a newline: right where that is the answer, whatever the padding."""
    examples = [("long prompt ", "ab"), ("p", "ab"), ("p", "ba"), ("q", "abc")]
    after = {ord("a") + 2: ord("b") + 2, ord("b") + 2: ord("\n") + 2}

    class Says:
        model = None

        def forward(self, batches):
            for batch in batches:
                ids = batch["input_ids"]
                best = ids.clone().apply_(lambda token: after.get(token, ord("a") + 2))
                yield torch.nn.functional.one_hot(best, 258).float()

    score = exact_match(Says(), tokenizer, examples, batch_size=3)
    assert score.mean == 0.5
    assert score.n == 4


def test_exact_match_needs_examples(tokenizer, runners):
    with pytest.raises(TextError, match="at least one example"):
        exact_match(runners[0], tokenizer, [])
