"""Does measuring on a large vocabulary take memory that does not grow with the window, and give the numbers of the plain way?"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qmerge.quality.measure import CHUNK_BYTES, compare_logits, measure
from qmerge.quality.perplexity import window_losses
from qmerge.quality.protocols import Plan
from qmerge.quality.reference import Answers
from qmerge.store.windows import TokenDoc, pack_windows

VOCABULARY, LONG = 100_000, 512
PEAK = """
import resource, sys, torch
sys.path[:0] = {path!r}
import test_quality_memory as here
models = here.large_model(0), here.large_model(1)
here.measure(*models, here.some_windows(here.VOCABULARY, 16, 16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
here.measure(*models, here.some_windows(here.VOCABULARY, here.LONG, here.LONG))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def large_model(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                        max_position_embeddings=LONG, tie_word_embeddings=True)).eval()  # fmt: skip


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def some_windows(vocabulary, tokens, length):
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    return pack_windows([TokenDoc(ids, torch.ones(tokens, dtype=torch.bool))], length, keep_tail=True)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation gave back."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and func is not torch.ops.aten.t.default:  # a view of the head's weight
                self.nbytes = max(self.nbytes, one.nbytes)
        return made


def test_no_tensor_is_as_wide_as_windows_times_vocabulary():
    """512 positions of 100,000 logits are 205 MB per model; a vocabulary of 256k on 8k tokens would be 8 GB."""
    models, windows = (large_model(0), large_model(1)), some_windows(VOCABULARY, LONG, LONG)
    cut = Plan("gptq", windows.ids, (1,), (1.0,), (0,), (), (), {})
    with Largest() as seen:
        measure(*models, windows)
        window_losses(Answers(models[0]), cut, "cpu")
    assert CHUNK_BYTES // 2 < seen.nbytes <= CHUNK_BYTES < 4 * LONG * VOCABULARY / 10


@pytest.mark.slow
def test_resident_memory_stays_below_a_quarter_gigabyte():
    """Many small tensors that live together; what a process really took is what ends it. In a process of its own: a peak is never taken back."""
    code = PEAK.format(path=[str(p) for p in sys.path])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.split()[-1]) < 256  # MB; whole logits of both models and what is computed from them took 510


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_scores_are_those_of_whole_logits(kind, zoo):
    """Soft-capping skipped, another position's state, a head without its bias: numbers of another model."""
    torch.manual_seed(0)
    reference, candidate = load(zoo.float(kind)), load(zoo.float(kind))
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    windows = some_windows(320, 100, 48)
    models = Answers(reference), Answers(candidate)
    found = measure(*models, windows)
    assert not models[0].whole and not models[1].whole
    with torch.no_grad():
        rows = [compare_logits(*(model(input_ids=ids[None]).logits[0, :-1] for model in (reference, candidate)), ids[1:]) for ids in windows.ids]
    for name in ("nll_ref", "nll_cand", "kl", "delta_p", "confidence"):
        np.testing.assert_allclose(getattr(found, name), torch.cat([row[name] for row in rows]).numpy(), rtol=3e-6, atol=3e-6, err_msg=name)
    assert (found.agree == torch.cat([row["agree"] for row in rows]).numpy()).all()


def test_kept_states_give_the_same_answers(zoo):
    """A state kept for other windows, or one that a later run has changed."""
    model, windows = load(zoo.float("llama")), some_windows(320, 100, 48)
    keeping = Answers(model, 10**9)
    first, again = measure(keeping, load(zoo.float("qwen2")), windows), measure(keeping, load(zoo.float("qwen2")), windows)
    assert len(keeping.kept) > 1 and (first.kl == again.kl).all() and first.kl.min() > 0


class Centred(torch.nn.Module):
    """A model that does something unknown behind its head."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, use_cache=False):
        logits = self.inner(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=logits * 0.5 - logits.mean(-1, keepdim=True))


def test_unknown_steps_behind_the_head_are_kept(zoo):
    """The head's own logits are not what such a model answers: its whole logits are used, and it is said."""
    model, windows = Centred(load(zoo.float("llama"))), some_windows(320, 40, 40)
    answers = Answers(model)
    found = measure(answers, model, windows)
    assert answers.whole and found.kl.max() == 0.0
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(windows.ids[0][None]).logits[0, :-1], windows.ids[0][1:], reduction="none")
    np.testing.assert_allclose(found.nll_ref, expected.numpy(), rtol=1e-6)
