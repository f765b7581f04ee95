"""What do models answer at chosen positions, with no more than a tile of logits at a time?

On a CPU the vocabulary is cut into tiles: a few thousand rows of the head meet a thousand positions in one product, and what came out is counted and dropped before the next
(`qmerge.quality.fused`). Elsewhere, and where logits are not finite, a few positions at a time get their whole logits, in torch. Nothing waits
for the device before a batch is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from qmerge.quality.divergence import compare_logits, support_divergence, supports_differ
from qmerge.quality.reference import Answers

ROWS = 1024
"""positions that meet one tile of the vocabulary: enough that the product is not bound by reading the head"""
COLUMNS = 256
"""entries of a tile at least"""
DEVICE_CHUNK_BYTES = 64 * 2**20
"""fp32 logits of one model that an accelerator turns into distributions at a time: its kernels need larger pieces than a cache holds"""
NUMBERS = ("nll_ref", "nll_cand", "kl", "agree", "delta_p", "confidence")
Work = Callable[[slice], None]


def compare_answers(models: tuple[Answers, Answers], states: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor, targets: torch.Tensor, chunk_bytes: int) -> dict[str, np.ndarray]:
    """Per chosen position the numbers of `divergence.compare_logits` and ``js`` of `divergence.support_divergence`, numpy ``[n]``.

    ``states``: what both models' ``states`` gave, ``[B, T, …]``; ``at`` int64 ``[n]`` positions in B·T, ``targets`` int64 ``[n]``, both on the CPU.
    ``chunk_bytes``: fp32 logits of one model that may be held.
    """
    flat = states[0].flatten(0, 1), states[1].flatten(0, 1)
    if flat[0].device.type == "cpu":
        found = _fused(models, flat, at, targets, chunk_bytes)
        finite, finite_ref = found.pop("finite"), found.pop("finite_ref")
        left, apart = np.flatnonzero(~finite), np.flatnonzero(~finite)
        rest = torch.from_numpy(left)
        for name, values in _in_torch(models, flat, at[rest], targets[rest], chunk_bytes)[0].items():
            # what the reference says of itself must not depend on the arm beside it
            keep = finite_ref[left] if name in ("nll_ref", "confidence") else np.zeros(len(left), bool)
            found[name][left] = np.where(keep, found[name][left], values)
        if models[0].width != models[1].width:
            apart = np.arange(len(at))
    else:
        found, differ = _in_torch(models, flat, at, targets, chunk_bytes)
        apart = np.flatnonzero(differ)
    found["js"] = np.full(len(at), np.nan, np.float32)
    found["js"][apart] = _js(models, flat, at[torch.from_numpy(apart)], chunk_bytes)
    return found


def answer_losses(answers: Answers, states: torch.Tensor, targets: torch.Tensor, chunk_bytes: int) -> np.ndarray:
    """``-log p(target)`` float64 ``[n]`` from states ``[n, …]`` and targets int64 ``[n]`` on the CPU: softmax over the whole vocabulary in fp32."""
    if states.device.type != "cpu":
        return _losses_in_torch(answers, states, targets, chunk_bytes)
    from qmerge.quality import fused

    state, wanted = fused.new_state(len(targets), fused.ONE_STATE), targets.numpy()
    with _threads() as share:
        for here, first, [logits] in _tiles((answers,), (states,), torch.arange(len(targets)), chunk_bytes):
            offset = here.start

            def add(part: slice, a: np.ndarray = logits, v: int = first, o: int = offset) -> None:
                fused.loss_tile(a[part.start - o : part.stop - o], v, wanted[part], state[part])

            share(here, add)
    found, finite = fused.losses(state)
    rest = torch.from_numpy(np.flatnonzero(~finite))
    found[~finite] = _losses_in_torch(answers, states[rest], targets[rest], chunk_bytes)
    return found


def _losses_in_torch(answers: Answers, states: torch.Tensor, targets: torch.Tensor, chunk_bytes: int) -> np.ndarray:
    targets, pieces = targets.to(states.device), _pieces((answers,), len(targets), chunk_bytes, states.device)
    parts = [torch.nn.functional.cross_entropy(answers.logits(states[here]).float(), targets[here], reduction="none") for here in pieces]
    return torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)


def _fused(models: tuple[Answers, Answers], flat: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor, targets: torch.Tensor, chunk_bytes: int) -> dict[str, np.ndarray]:
    from qmerge.quality import fused

    state, wanted = fused.new_state(len(at)), targets.numpy()
    with _threads() as share:
        for here, first, (ref, cand) in _tiles(models, flat, at, chunk_bytes):
            offset = here.start

            def add(part: slice, a: np.ndarray = ref, b: np.ndarray = cand, v: int = first, o: int = offset) -> None:
                fused.compare_tile(a[part.start - o : part.stop - o], b[part.start - o : part.stop - o], v, wanted[part], state[part])

            share(here, add)
    return fused.comparison(state)


def _in_torch(models: tuple[Answers, Answers], flat: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor, targets: torch.Tensor, chunk_bytes: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same with whole logits of a few positions, and where supports differ. All stays on the device until the last piece is done."""
    device = flat[0].device
    at, targets, width, rows = at.to(device), targets.to(device), min(model.width for model in models), []
    for here in _pieces(models, len(at), chunk_bytes, device):
        ref, cand = _whole(models, flat, at[here])
        numbers = compare_logits(ref[..., :width], cand[..., :width], targets[here])
        rows.append(torch.stack([*(numbers[name].float() for name in NUMBERS), supports_differ(ref, cand).float()]))
    table = torch.cat(rows, 1).cpu().numpy() if rows else np.zeros((len(NUMBERS) + 1, 0), np.float32)
    return {name: column.astype(bool) if name == "agree" else column for name, column in zip(NUMBERS, table, strict=False)}, table[-1].astype(bool)


def _js(models: tuple[Answers, Answers], flat: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor, chunk_bytes: int) -> np.ndarray:
    at = at.to(flat[0].device)
    rows = [support_divergence(*_whole(models, flat, at[here])) for here in _pieces(models, len(at), chunk_bytes, at.device)]
    return torch.cat(rows).cpu().numpy() if rows else np.zeros(0, np.float32)


def _whole(models: tuple[Answers, ...], flat: tuple[torch.Tensor, ...], at: torch.Tensor) -> list[torch.Tensor]:
    return [model.logits(each[at]) for model, each in zip(models, flat, strict=True)]


def _tiles(models: tuple[Answers, ...], flat: tuple[torch.Tensor, ...], at: torch.Tensor, chunk_bytes: int) -> Iterator[tuple[slice, int, list[np.ndarray]]]:
    """(places in ``at``, the tile's first entry, fp32 logits ``[places, tile]`` of each model), all tiles of some places before the next places."""
    width = min(model.width for model in models)
    rows, columns = _size(models, len(at), chunk_bytes)
    for start in range(0, len(at), rows):
        here = slice(start, min(start + rows, len(at)))
        states = [each[at[here]] for each in flat]
        for first in range(0, width, columns):
            stop = min(first + columns, width)
            yield here, first, [model.logits(part, first, stop).float().contiguous().numpy() for model, part in zip(models, states, strict=True)]


def _size(models: tuple[Answers, ...], count: int, chunk_bytes: int) -> tuple[int, int]:
    """Positions and entries of a tile."""
    width = max(model.width for model in models)
    rows = max(1, min(count, ROWS))
    if 4 * width * rows <= chunk_bytes or not all(model.splits for model in models):
        return max(1, chunk_bytes // (4 * width)), width
    columns = chunk_bytes // (4 * rows) // 16 * 16
    if columns >= COLUMNS:
        return rows, columns
    return max(1, chunk_bytes // (4 * COLUMNS)), COLUMNS


def _pieces(models: tuple[Answers, ...], count: int, chunk_bytes: int, device: torch.device) -> Iterator[slice]:
    step = max(1, (chunk_bytes if device.type == "cpu" else max(chunk_bytes, DEVICE_CHUNK_BYTES)) // (4 * max(model.width for model in models)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@contextmanager
def _threads() -> Iterator[Callable[[slice, Work], None]]:
    """A function that gives each of torch's threads its share of a slice; every place is counted by itself, so that shares change no bits."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:

        def share(here: slice, work: Work) -> None:
            step = -(-(here.stop - here.start) // threads)
            list(pool.map(work, [slice(start, min(start + step, here.stop)) for start in range(here.start, here.stop, step)]))

        yield share
