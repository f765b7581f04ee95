"""Are greedy continuations what a model would write, and is the place where two of them part found?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import greedy_slow as slow

from qmerge.errors import UsageProblem
from qmerge.quality import generation
from qmerge.quality.generation import Generations, Prompts, check_room, choose_prompts, continuations, divergence, end_tokens
from qmerge.quality.reference import Answers
from qmerge.store.texts import Document
from qmerge.store.windows import pack_windows, tokenize_documents


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def some_prompts(lengths):
    random = torch.Generator().manual_seed(0)
    return [torch.randint(2, 320, (n,), generator=random) for n in lengths]


def as_lists(written):
    return [[token for token in row if token >= 0] for row in written.tolist()]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_continuations_equal_the_slow_ones(kind, zoo):
    """Left padding that is attended to, positions that count it, a cache that is off by one, a sliding window: each shifts a token somewhere."""
    model, prompts = load(zoo.float(kind)), some_prompts([5, 30, 17, 30])
    written = as_lists(continuations(model, prompts, 24, [], "cpu"))
    assert written == [slow.continued(model, prompt.tolist(), 24, set()) for prompt in prompts]


def test_continuations_end_where_the_slow_ones_end(zoo):
    """Tokens behind an end of text are nobody's text, and a batch goes on until its last row has ended."""
    model, prompts = load(zoo.float("llama")), some_prompts([9, 12, 20, 28])
    free = [slow.continued(model, prompt.tolist(), 24, set()) for prompt in prompts]
    ends = {free[0][3], free[2][11]}
    written = as_lists(continuations(model, prompts, 24, sorted(ends), "cpu"))
    assert written == [slow.continued(model, prompt.tolist(), 24, ends) for prompt in prompts] and len(written[0]) <= 4


def test_batches_do_not_change_a_continuation(zoo, monkeypatch):
    """A continuation that depends on which others it was made with."""
    model, prompts = load(zoo.float("llama")), some_prompts([5, 30, 17, 8])
    together = continuations(model, prompts, 12, [], "cpu")
    monkeypatch.setattr(generation, "BATCH", 1)
    assert (continuations(model, prompts, 12, [], "cpu") == together).all()


def test_settings_of_the_model_do_not_reach_the_continuation(zoo):
    """`generate` takes sampling and penalties from generation_config.json without being asked."""
    model, prompts = load(zoo.float("llama")), some_prompts([9])
    plain = continuations(model, prompts, 12, [], "cpu")
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 50.0, True
    assert (continuations(model, prompts, 12, [], "cpu") == plain).all()


def test_divergence_equals_the_slow_count():
    """Off by one in the position; an end counted as a token, or a shorter continuation as equal."""
    random = np.random.default_rng(0)
    theirs = random.integers(0, 3, (40, 12))
    ours = np.where(random.random((40, 12)) < 0.08, 7, theirs)
    for rows in (ours, theirs):
        for row in rows[:10]:
            row[random.integers(0, 12) :] = -1
    lists = [as_lists(rows) for rows in (ours, theirs)]
    positions = [slow.first_difference(a, b, 12) for a, b in zip(*lists, strict=True)]
    exact, median, deciles = divergence(ours, theirs)
    assert exact.value == sum(a == b for a, b in zip(*lists, strict=True)) / 40 and exact.ci_low < exact.value < exact.ci_high
    assert median.value == sorted(positions)[19] and median.n == 40 and deciles == [sorted(positions)[max(0, 4 * i - 1)] for i in range(11)]


def test_continuations_that_never_part_are_counted_and_said():
    """A median of 8 where nothing was seen beyond 8 tokens is no position at which they part."""
    same = np.arange(48).reshape(6, 8)
    exact, median, deciles = divergence(same, same)
    assert (exact.value, median.value, deciles) == (1.0, 8.0, [8.0] * 11) and exact.ci_low < 1.0
    assert "6 of 6" in median.note and "lower bound" in median.note
    other = same.copy()
    other[:4, 3] = 99
    _, median, _ = divergence(other, same)
    assert median.value == 3.0 and "2 of 6" in median.note and "lower bound" not in median.note


def test_prompts_are_what_the_rows_say(zoo):
    """A prompt that already holds its answer, or ends in the end of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.float("llama"))
    rows = [Document(f"the cat {i} sat on", ((f"the cat {i}", False), (" sat on", True))) for i in range(9)]
    docs = tokenize_documents(rows, tokenizer)
    found = choose_prompts(docs, pack_windows(docs, 16), 3, 100)
    assert found.source == "what the rows call their prompt" and [tokenizer.decode(ids) for ids in found.ids] == ["<s>the cat 0", "<s>the cat 4", "<s>the cat 8"]
    assert [len(ids) for ids in choose_prompts(docs, pack_windows(docs, 16), 3, 2).ids] == [2, 2, 2]
    short = tokenize_documents([Document("the cat"), Document("the cat " * 50)], tokenizer)
    found = choose_prompts(short, pack_windows(short, 400), 2, 100)
    assert found.source == "the first tokens of documents" and tokenizer.decode(found.ids[0]) == "<s>the cat" and len(found.ids[1]) == 32
    found = choose_prompts(short, pack_windows(short, 16), 4, 100)
    assert found.source == "the first tokens of windows" and len(found.ids) == 4
    with pytest.raises(UsageProblem, match="do not fit"):
        check_room(64, 64)


def test_rows_are_paired_with_separate_and_the_prompts_are_in_the_fingerprint(zoo):
    """Continuations of other prompts under the same name; an end token of the model's settings that nothing stops at."""
    model = load(zoo.float("llama"))
    measures = Generations({"t": Prompts(tuple(some_prompts([8, 9, 10, 11])), "x")}, 8, end_tokens(model, type("T", (), {"eos_token_id": 5})))
    for arm in ("separate", "same"):
        measures.add(arm, Answers(model), "cpu", lambda what: None)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight.flip(0)
    measures.add("other", Answers(model), "cpu", lambda what: None)
    assert measures.row("same")["t"]["exact_match"]["value"] == 1.0 and measures.row("other")["t"]["exact_match"]["value"] == 0.0
    assert measures.row("other")["t"]["first_divergence"]["value"] == 0.0
    assert measures.fingerprint["ends_at"] == [1, 5] and measures.fingerprint["texts"]["t"]["prompts"] == 4
    changed = Generations({"t": Prompts(tuple(some_prompts([8, 9, 10, 12])), "x")}, 8, [1, 5])
    assert changed.fingerprint != measures.fingerprint
