"""Which scales and norms make the requantized model answer as the separate one does, its codes left alone?

``--polish distill``: forward KL to the separate model's logits, Adam on relative changes of scales, block maxima, norms and biases (`qmerge.pipeline.opened`).
The state with the lowest KL on the held-out windows is kept, the start among them: the result is never worse there. A batch is cut into pieces that depend on
nothing but its shape, each a core's own work, and their gradients are summed in order: the same bytes for any number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmerge.device import in_parallel
from qmerge.numerics.distances import fit
from qmerge.numerics.divergence import divergence
from qmerge.numerics.lora import delta_survival
from qmerge.pipeline.calibrate import Calibration
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.opened import Opened
from qmerge.pipeline.plan import MergePlan
from qmerge.pipeline.polish_state import Keeper, State, state_key
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.stop import Stop
from qmerge.pipeline.student import Teacher

PIECE_TOKENS = 512
"""tokens of a piece, about"""


@dataclass(frozen=True)
class DistillSettings:
    """``lr``: the relative change of a scale that a step makes at most, about; ``norm_lr``: that of norms and biases, relative to their root mean square."""

    steps: int = 60
    windows: int = 8
    """windows of a step"""
    lr: float = 1e-3
    norm_lr: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.99
    warmup: int = 5
    final: float = 0.05
    """after the warm-up the rates follow a cosine down to this share"""
    check_every: int = 20
    """steps from one look at the held-out windows to the next"""
    patience: int = 3
    """looks without a lower KL after which it ends"""
    save_every: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Distilled:
    """``solved``: every linear, under the same names and with the same codes. ``floats``: the norms and biases that changed, in the dtype in which they are stored.

    ``record`` goes into the manifest; it is the same for the same inputs, so the time is not in it.
    """

    solved: dict[str, Solved]
    floats: dict[str, torch.Tensor]
    record: dict[str, Any]
    elapsed_s: float


@torch.no_grad()
def distill(
    plan: MergePlan, merged: Merged, calibration: Calibration, solved: dict[str, Solved], model_dtype: torch.dtype, settings: DistillSettings | None = None,
    workdir: Path | None = None, progress: Callable[[str], None] = lambda _: None, more: torch.Tensor | None = None,
    stop: Stop | None = None,
) -> Distilled:  # fmt: skip
    """Train what is not codes. ``more``: token ids ``[n, T]`` to train on besides ``calibration.train``; the solver has not fitted those.

    With ``workdir`` the state is saved there as it goes, also where ``stop`` ends it; a rerun on the same inputs goes on from it, to the same bytes. The whole student is in memory in fp32,
    and a gradient of that size per core.
    """
    began, settings = time.perf_counter(), settings or DistillSettings()
    train = calibration.train if more is None else torch.cat((calibration.train, more))
    size = max(1, PIECE_TOKENS // train.shape[1])
    pieces, seen = [[part.to(merged.device) for part in ids.split(size)] for ids in (train, calibration.held_out)]
    teacher = Teacher(plan, merged, [*pieces, *seen])
    opened = Opened(plan, merged, solved, model_dtype)
    work = _Training(teacher, opened, len(pieces), settings, max(1, settings.windows // size))
    key = state_key(plan.recipe.to_json(), settings, [*pieces, *seen, *teacher.hidden], solved) if workdir is not None else ""
    state, resumed = work.run(Keeper(workdir, key, progress), progress, stop or Stop())
    kept, floats = _results(opened, state.best, merged, solved)
    record = {
        "steps": state.step, "kept_step": state.best_step, "held_out_kl_before": state.start_kl, "held_out_kl_after": state.best_kl, "unit": "nats/token",
        "seed": settings.seed, "windows": int(train.shape[0]), "held_out_windows": int(calibration.held_out.shape[0]),
    }  # fmt: skip
    progress(
        f"distill: held-out KL {state.start_kl:.3e} -> {state.best_kl:.3e} nats/token, {state.step} steps"
        + (" (resumed)" if resumed else "")
    )
    return Distilled(kept, floats, record, time.perf_counter() - began)


class _Training:
    """The loop. Pieces 0 … ``count`` - 1 of the teacher are trained on, the others are held out."""

    def __init__(self, teacher: Teacher, opened: Opened, count: int, settings: DistillSettings, per_step: int) -> None:
        self.teacher, self.opened, self.count, self.settings, self.per_step = teacher, opened, count, settings, min(per_step, count)
        self.device = opened.merged.device
        self.rates = torch.full((opened.size,), settings.lr)
        self.rates[opened.scale_count :] = settings.norm_lr

    def run(self, keeper: Keeper, progress: Callable[[str], None], stop: Stop) -> tuple[State, bool]:
        """The state at the end, and whether it began in a saved one."""
        settings, state = self.settings, keeper.load(self.opened.size)
        resumed = state is not None
        if state is None:
            self.opened.set(torch.zeros(self.opened.size))
            first = self.held_out_kl()
            state = State.begin(self.opened.size, first)
        self.opened.set(state.theta)
        while state.step < settings.steps and state.idle < settings.patience:
            stop.finishing = f"step {state.step + 1}/{settings.steps} of distilling"
            gradient, loss = self.gradient(self.drawn(state.step))
            if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
                progress(f"distill: step {state.step + 1} is not finite; what was best before is kept")
                stop.finishing = ""
                break
            in_parallel(partial(self.move, state), [gradient], torch.device("cpu"))
            state.step += 1
            self.opened.set(state.theta)
            if state.step % settings.check_every == 0 or state.step == settings.steps:
                state.look(self.held_out_kl())
                progress(
                    f"distill: step {state.step}/{settings.steps}, KL {loss:.3e} on its windows, best held-out {state.best_kl:.3e} (start {state.start_kl:.3e}) nats/token"
                )
            stop.finishing = ""
            if state.step % settings.save_every == 0 or state.step == settings.steps or stop.wanted:
                keeper.save(state)
            stop.check()
        return state, resumed

    def drawn(self, step: int) -> list[int]:
        """The pieces of a step: each once per round, in an order that seed and round decide."""
        found: list[int] = []
        for place in range(step * self.per_step, (step + 1) * self.per_step):
            dice = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + place // self.count)
            found.append(int(torch.randperm(self.count, generator=dice)[place % self.count]))
        return found

    def gradient(self, numbers: Sequence[int]) -> tuple[torch.Tensor, float]:
        """(by θ ``[size]``, mean KL in nats/token) of some pieces."""
        tokens = sum(self.teacher.batches[number].numel() for number in numbers)
        parts = in_parallel(lambda number: self._piece(number, tokens), numbers, self.device)
        total = in_parallel(lambda pairs: _sum([gradient for gradient, _ in pairs]), [parts], torch.device("cpu"))[0]
        return total, sum(loss for _, loss in parts)

    def _piece(self, number: int, tokens: int) -> tuple[torch.Tensor, float]:
        aim, ids = self.teacher.logits(number), self.teacher.batches[number]
        with torch.enable_grad():
            logits = self.opened.model(input_ids=ids, use_cache=False).logits
        kl, slope = divergence(aim, logits.detach())
        gradients = torch.autograd.grad(
            logits, list(self.opened.parameters.values()), slope.div_(tokens).to(logits.dtype), materialize_grads=True
        )
        return self.opened.reduce(gradients), float(kl.sum()) / tokens

    def held_out_kl(self) -> float:
        """Mean over the held-out tokens, nats/token."""
        numbers = range(self.count, len(self.teacher.batches))
        tokens = sum(self.teacher.batches[number].numel() for number in numbers)
        return sum(in_parallel(self._kl, numbers, self.device)) / tokens

    def _kl(self, number: int) -> float:
        logits = self.opened.model(input_ids=self.teacher.batches[number], use_cache=False).logits
        return float(divergence(self.teacher.logits(number), logits)[0].sum())

    def move(self, state: State, gradient: torch.Tensor) -> None:
        """One step of Adam (Kingma and Ba, 2015)."""
        settings, count = self.settings, state.step + 1
        state.mean.lerp_(gradient, 1 - settings.beta1)
        state.square.lerp_(gradient.square(), 1 - settings.beta2)
        size = (state.square / (1 - settings.beta2**count)).sqrt_().add_(1e-12)
        state.theta.sub_(self.rates * (self.rate(state.step) / (1 - settings.beta1**count)) * state.mean / size)

    def rate(self, step: int) -> float:
        """The share of the full rates at a step."""
        settings = self.settings
        fall = settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * step / max(settings.steps, 1)))
        return fall * min(1.0, (step + 1) / max(settings.warmup, 1))


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _results(
    opened: Opened, theta: torch.Tensor, merged: Merged, solved: dict[str, Solved]
) -> tuple[dict[str, Solved], dict[str, torch.Tensor]]:
    kept = dict(
        zip(solved, in_parallel(lambda name: _kept(opened, name, theta, merged, solved[name]), list(solved), merged.device), strict=True)
    )
    floats = {}
    for name, (start, _) in opened.floats.items():
        value = opened.value(name, theta)
        if not torch.equal(value, start):
            floats[name] = value.cpu().to(merged.out_dtype(name))
    return kept, floats


def _kept(opened: Opened, name: str, theta: torch.Tensor, merged: Merged, before: Solved) -> Solved:
    if name not in opened.scales:
        return before
    part = opened.scales[name]
    scales = opened.value(name, theta)
    if torch.equal(scales, part.start):
        return before
    weight, wanted, delta = part.weight(scales).to(merged.device), merged.weight(name), merged.delta(name)
    survival = delta_survival(weight, wanted - delta, delta) if delta is not None else None
    near = fit(weight, wanted)
    return replace(
        before,
        quantized=part.build(scales),
        weight=weight,
        distance=near.distance,
        slope=near.slope,
        survival=survival if survival == survival else None,
        bands=near.bands,
    )
