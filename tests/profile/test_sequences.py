"""Cutting, putting aside, batching and sampling: nothing lost, nothing twice, the same every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.errors import TextError
from moekit.profile._choose import choose, prefill_cells
from moekit.profile._sequences import TokenSequence, batches, cut, priorities


class Letters:
    """One token per character; a special token first, unless it is written out."""

    bos_token, bos_id = "^", 1

    def __call__(self, text, add_special_tokens, verbose):
        ids = [ord(c) % 97 + 3 for c in text]
        return {"input_ids": [self.bos_id, *ids] if add_special_tokens else ids}


def cut_all(texts, **options):
    defaults = {"length": 16, "max_tokens": None, "held_out": 0.1, "seed": 0}
    return cut(texts, Letters(), **{**defaults, **options})


documents = st.lists(st.text("abcdefgh", min_size=2, max_size=80), min_size=1, max_size=8)


@given(documents, st.integers(2, 20), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 3))
def test_every_piece_is_observed_or_kept_aside_and_never_both(texts, length, share, seed):
    sequences, aside = cut_all({"d": texts}, length=length, held_out=share, seed=seed)
    whole = sum(len(text) + 1 for text in texts)
    dropped = sum((len(text) + 1) % length == 1 for text in texts)
    seen = sum(len(s.ids) for s in sequences)
    assert seen + sum(map(len, aside["d"])) == whole - dropped
    assert sequences
    assert (share > 0) >= bool(aside["d"])
    again, aside_again = cut_all({"d": texts}, length=length, held_out=share, seed=seed)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(sequences, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(aside["d"], aside_again["d"], strict=True))


def test_halves_take_turns_and_domains_share_the_budget():
    sequences, _ = cut_all({"a": ["x" * 200], "b": ["y" * 200]}, max_tokens=90)
    by_domain = {d: [s for s in sequences if s.domain == d] for d in (0, 1)}
    assert [sum(len(s.ids) for s in by_domain[d]) for d in (0, 1)] == [45, 45]
    assert [s.half for s in by_domain[0]] == [0, 1, 0]


def test_the_seed_chooses_other_pieces():
    texts = {"a": ["".join(chr(97 + i % 23) for i in range(n, n + 200)) for n in range(5)]}
    one, two = (cut_all(texts, max_tokens=64, seed=seed)[0] for seed in (0, 1))
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(one, two, strict=True))


def test_one_short_document_gives_its_end_to_be_held_out():
    sequences, aside = cut_all({"a": ["abcdefghij"]}, length=64)
    assert [len(s.ids) for s in sequences] == [9]
    assert [len(ids) for ids in aside["a"]] == [2]


def test_a_rendered_chat_gets_no_second_beginning():
    (sequence,), _ = cut_all({"a": ["^hello"]}, held_out=0)
    assert len(sequence.ids) == len("^hello")


def test_text_of_single_tokens_is_refused():
    with pytest.raises(TextError, match="domain 'a' has fewer than 2 tokens in every document"):
        cut_all({"a": [""]})


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(8, 64), st.booleans())
def test_batches_hold_every_sequence_once_and_keep_their_bound(sizes, tokens, padded):
    sequences = [TokenSequence(np.arange(size) + 5, 0, 0) for size in sizes]
    made = batches(sequences, tokens=tokens, pad=0, padded=padded)
    assert sorted(n for batch in made for n in batch.number) == list(range(len(sizes)))
    for batch in made:
        assert batch.ids.numel() <= tokens or len(batch.number) == 1
        assert padded or batch.mask.all()
        assert ("attention_mask" in batch.inputs()) == (not bool(batch.mask.all()))
        for row, number in enumerate(batch.number):
            assert batch.ids[row][batch.mask[row]].tolist() == sequences[number].ids.tolist()


def test_padding_counts_towards_no_cell():
    sequences = [TokenSequence(np.arange(5), 0, 0), TokenSequence(np.arange(3), 1, 1)]
    chosen = choose(sequences, sample=4, trace=8, decode=0, seed=0)
    (batch,) = batches(sequences, tokens=64, pad=0)
    cells = prefill_cells(batch, sequences, chosen, 2)
    assert cells.cell.tolist() == [0] * 5 + [6] * 3 + [-1] * 2
    assert sorted(cells.trace[1]) == list(range(8))
    assert all(cells.cell[p] >= 0 for p in cells.trace[0])
    assert cells.priority[:5].tolist() == priorities(sequences[0], 0).tolist()
    assert prefill_cells(batch, sequences, choose(sequences, sample=0, trace=0, decode=0, seed=0), 2).priority is None


def test_priorities_differ_by_position_text_and_seed():
    one = TokenSequence(np.arange(50), 0, 0)
    assert len(set(priorities(one, 0).tolist())) == 50
    assert not np.intersect1d(priorities(one, 0), priorities(one, 1)).size
    assert not np.intersect1d(priorities(one, 0), priorities(TokenSequence(np.arange(50) + 1, 0, 0), 0)).size


def test_traces_are_whole_sequences_with_domains_in_turn():
    sequences = [TokenSequence(np.arange(4), d, 0) for d in (0, 0, 1, 1)]
    trace = choose(sequences, sample=0, trace=17, decode=1, seed=0).trace
    assert trace["sequence"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert trace["domain"].tolist() == [0] * 5 + [1] * 5 + [0] * 5
    assert trace["phase"].tolist() == [0, 0, 0, 0, 1] * 3
