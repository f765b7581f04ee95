"""Which text would the separate model itself write, going on from the calibration text?

The solver has fitted the calibration windows closely, so they say little about what is still wrong: trained on them alone, scales learn the windows. Text that
the separate model samples has its own distribution, costs no new data, and leaves the calibration tokens those that every arm of a comparison may see.
"""

from __future__ import annotations

import torch
from torch import nn

from qmerge.device import in_parallel

PROMPT = 16
"""tokens of a calibration window that a sample begins with"""
TOGETHER = 16
"""samples that one core writes side by side"""


def generate(model: nn.Module, windows: torch.Tensor, count: int, seed: int, device: torch.device, prompt: int = PROMPT) -> torch.Tensor:
    """Token ids int64 ``[count, T]``, sampled at temperature 1, each from the first tokens of one of ``windows`` ``[n, T]``, taken in turn.

    ``model`` is the separate model in fp32. The same seed gives the same ids, whatever the number of threads.
    """
    turns = torch.arange(count) % windows.shape[0]
    prompt = min(prompt, windows.shape[1] // 2)
    starts = windows[turns][:, :prompt].split(TOGETHER)
    return torch.cat(in_parallel(lambda item: _sample(model, item[1].to(device), windows.shape[1], seed + item[0]).cpu(), list(enumerate(starts)), device))


def _sample(model: nn.Module, ids: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    cache, step = None, ids
    with torch.no_grad():
        while ids.shape[1] < length:
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            share = out.logits[:, -1].float().softmax(-1).cumsum(-1, dtype=torch.float64)
            drawn = torch.rand(ids.shape[0], 1, generator=dice, dtype=torch.float64).to(ids.device) * share[:, -1:]
            step = torch.searchsorted(share, drawn).clamp(max=share.shape[-1] - 1)
            ids = torch.cat((ids, step), dim=1)
    return ids
