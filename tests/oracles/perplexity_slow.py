"""Perplexity as four public tools compute it, told again slowly: one window at a time, one token at a time, fp64 log-softmax of the model's logits.

Written from what the tools do, not from ``qmerge.quality.protocols``: GPTQ's and SparseGPT's evaluation loop, the code on transformers' page on
perplexity (run through the model's own ``labels``), llama.cpp's perplexity tool, and lm-eval's rolling log-likelihood.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch


def log_probability(model: Any, window: list[int], at: int) -> float:
    """log p(window[at] | window[:at]), the whole window given to the model."""
    logits = model(input_ids=torch.tensor([window])).logits[0, at - 1].double()
    return float(logits[window[at]] - torch.logsumexp(logits, 0))


def log_probabilities(model: Any, window: list[int]) -> list[float]:
    """One per token of the window but the first."""
    rows = model(input_ids=torch.tensor([window])).logits[0].double()
    return [float(rows[at - 1][window[at]] - torch.logsumexp(rows[at - 1], 0)) for at in range(1, len(window))]


def gptq(model: Any, ids: list[int], seqlen: int) -> float:
    samples, nlls = len(ids) // seqlen, []
    for number in range(samples):
        window = ids[number * seqlen : (number + 1) * seqlen]
        loss = -sum(log_probabilities(model, window)) / (seqlen - 1)
        nlls.append(loss * seqlen)
    return math.exp(sum(nlls) / (samples * seqlen))


def strided(model: Any, ids: list[int], max_length: int, stride: int) -> float:
    total, tokens, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        new = end - previous
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, :-new] = -100
        counted = int((labels != -100).sum()) - 1
        if counted:
            total += float(model(input_ids=inputs, labels=labels).loss) * counted
        tokens += counted
        previous = end
        if end == len(ids):
            break
    return math.exp(total / tokens)


def llama_cpp(model: Any, ids: list[int], n_ctx: int, bos: int | None) -> float:
    nll, count, first = 0.0, 0, n_ctx // 2
    for chunk in range(len(ids) // n_ctx):
        window = ids[chunk * n_ctx : (chunk + 1) * n_ctx]
        if bos is not None:
            window = [bos, *window[1:]]
        for at in range(first, n_ctx - 1):
            nll, count = nll - log_probability(model, window, at + 1), count + 1
    return math.exp(nll / count)


def lm_eval(model: Any, documents: list[str], tokenizer: Any, prefix: int, max_length: int) -> tuple[float, float, float]:
    """``(word perplexity, byte perplexity, bits per byte)``."""
    total, words, size = 0.0, 0, 0
    for text in documents:
        ids = list(tokenizer(text)["input_ids"])
        done = 0
        while done < len(ids):
            now = min(max_length, len(ids) - done)
            # the last tokens get as much context as the window has room for, the others one token
            context = [prefix] if done == 0 else ids[max(0, done + now - max_length - 1) : done]
            given = [*context, *ids[done : done + now]]
            for at in range(len(context), len(given)):
                total += log_probability(model, given[: at + 1], at)
            done += now
        words += len(re.split(r"\s+", text))
        size += len(text.encode("utf-8"))
    return math.exp(-total / words), math.exp(-total / size), -total / size / math.log(2)
