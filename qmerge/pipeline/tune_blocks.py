"""Which codes of a solved block, each moved by one place at most, bring its output closest to the teacher's?

``--polish blocks``: the offsets of AutoRound (Cheng et al., 2023), but from the solver's codes, and towards the output that the separate model's block has on its
own inputs, so that a block also undoes what earlier ones left. The best state on the held-out windows is kept, the solver's among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qmerge.device import in_parallel, to_device
from qmerge.numerics.distances import fit
from qmerge.numerics.lora import delta_survival
from qmerge.numerics.offsets import BOUND, Offsets, offsets
from qmerge.numerics.stored_scales import stored_scales
from qmerge.pipeline.blocks import Call, empty_copy
from qmerge.pipeline.candidates import Linear
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.skeleton import set_weight

PIECE_TOKENS = 512
MOST = 4.0
"""root mean squares that a step goes at most"""


@dataclass(frozen=True)
class TuneSettings:
    """Scales first, alone; then, from the best scales, the codes too. ``lr``: how far an offset moves per step at first (0.5 moves a code); ``scale_lr``: the relative
    change of a scale per step; both as root mean squares, and both fall linearly to 0 in either part."""

    scale_steps: int = 12
    code_steps: int = 12
    tokens: int = 4096
    """of a step, about"""
    lr: float = 0.025
    scale_lr: float = 1e-3
    check_every: int = 4
    patience: int = 2
    """looks at the held-out windows without a lower error after which a part ends"""
    seed: int = 0


@dataclass(frozen=True)
class Passage:
    """Some windows at one block: what the run-time stream feeds it, what the teacher's block gave out, both fp32 ``[windows, T, hidden]``, and the call's arguments."""

    runtime: torch.Tensor
    teacher: torch.Tensor
    call: Call
    held_out: bool


@dataclass(frozen=True)
class Tuned:
    """``solved`` by module name. Errors are squared errors of the block's output over the teacher's power, on the held-out windows."""

    solved: dict[str, Solved]
    error_before: float
    error_after: float
    moved: int
    """codes that are not the solver's"""


@torch.no_grad()
def tune_block(
    block: nn.Module, solved: Mapping[str, Solved], linears: Mapping[str, Linear], turned: Mapping[str, bool], passages: Sequence[Passage], model_dtype: torch.dtype,
    settings: TuneSettings | None = None, device: torch.device | None = None,
) -> Tuned:  # fmt: skip
    """``block``: the run-time block as solved, in fp32; it is not changed. Keys are module names within it; ``turned``: does the module hold ``[in, out]``? ``device``: where it is computed, where passages do
    not lie there."""
    settings = settings or TuneSettings()
    work = _Tuning(block, solved, turned, _cut(passages), model_dtype, device or passages[0].runtime.device)
    best = before = work.held_out()
    kept = work.snapshot()
    for steps, lr in ((settings.scale_steps, 0.0), (settings.code_steps, settings.lr)):
        work.restore(kept)
        idle = 0
        for step in range(steps):
            work.step(work.drawn(step, settings), 1 - step / steps, lr, settings.scale_lr)
            if (step + 1) % settings.check_every and step + 1 < steps:
                continue
            error, idle = work.held_out(), idle + 1
            if error < best:  # NaN is never below
                best, kept, idle = error, work.snapshot(), 0
            if idle == settings.patience:
                break
    work.restore(kept)
    found = {name: work.result(name, solved[name], linears[name]) for name in solved}
    moved = sum(int((found[name].quantized.codes != solved[name].quantized.codes).sum()) for name in solved)
    return Tuned(found, before, best, moved)


def _cut(passages: Sequence[Passage]) -> list[Passage]:
    """Pieces of about ``PIECE_TOKENS``, cut by shape alone."""
    found = []
    for passage in passages:
        windows = passage.runtime.shape[0]
        size = max(1, PIECE_TOKENS // passage.runtime.shape[1])
        for start in range(0, windows, size):
            span = slice(start, min(start + size, windows))
            found.append(Passage(passage.runtime[span], passage.teacher[span], rows_of(passage.call, span, windows), passage.held_out))
    return found


def rows_of(call: Call, span: slice, windows: int) -> Call:
    """The call for some windows of a batch of ``windows``: tensors with one row per window are cut."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[span] if value.dim() and value.shape[0] == windows and windows > 1 else value
        return tuple(cut(item) for item in value) if isinstance(value, tuple) else value

    return Call(cut(call.args), {key: cut(value) for key, value in call.kwargs.items()})


class _Tuning:
    """A block with its linears' offsets opened."""

    def __init__(
        self,
        block: nn.Module,
        solved: Mapping[str, Solved],
        turned: Mapping[str, bool],
        pieces: list[Passage],
        model_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block, self.turned = empty_copy(block), turned
        self.train, self.seen = [piece for piece in pieces if not piece.held_out], [piece for piece in pieces if piece.held_out]
        self.device = device
        self.cpu = torch.device("cpu")
        names = list(solved)
        opened = in_parallel(lambda name: offsets(stored_scales(solved[name].quantized, model_dtype)), names, self.cpu)
        self.opened: dict[str, Offsets] = dict(zip(names, opened, strict=True))
        self.power = sum(float(self._here(piece.teacher).square().sum(dtype=torch.float64)) for piece in self.seen)
        self._set()

    def _set(self) -> None:
        weights = in_parallel(lambda name: self.opened[name].weight(), list(self.opened), self.cpu)
        for name, weight in zip(self.opened, weights, strict=True):
            set_weight(self.block, f"{name}.weight", (weight.T.contiguous() if self.turned[name] else weight).to(self.device))
        self.parameters = [self.block.get_submodule(name).get_parameter("weight").requires_grad_(True) for name in self.opened]

    def drawn(self, step: int, settings: TuneSettings) -> list[Passage]:
        """The pieces of a step, each once per round."""
        each = max(1, settings.tokens // (self.train[0].runtime.shape[0] * self.train[0].runtime.shape[1]))
        count, found = len(self.train), []
        for place in range(step * each, (step + 1) * each):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + place // count))
            found.append(self.train[int(order[place % count])])
        return found

    def step(self, pieces: list[Passage], share: float, lr: float, scale_lr: float) -> None:
        """One step on some pieces, at a share of the rates."""
        parts = in_parallel(self._gradients, pieces, self.device)
        pairs = list(zip(self.opened.items(), zip(*parts, strict=True), strict=True))
        in_parallel(lambda pair: _move(pair[0][1], pair[1], self.turned[pair[0][0]], share * lr, share * scale_lr), pairs, self.cpu)
        self._set()

    def _gradients(self, piece: Passage) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            loss = (self._out(piece) - self._here(piece.teacher)).square().sum()
        return torch.autograd.grad(loss, self.parameters, materialize_grads=True)

    def _here(self, activations: torch.Tensor) -> torch.Tensor:
        return to_device(activations, self.device)

    def _out(self, piece: Passage) -> torch.Tensor:
        out = self.block(self._here(piece.runtime), *piece.call.args, **piece.call.kwargs)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def held_out(self) -> float:
        errors = in_parallel(
            lambda piece: float((self._out(piece) - self._here(piece.teacher)).square().sum(dtype=torch.float64)), self.seen, self.device
        )
        return sum(errors) / max(self.power, 1e-300)

    def snapshot(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {name: (part.offset.clone(), part.theta.clone()) for name, part in self.opened.items()}

    def restore(self, kept: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, (offset, theta) in kept.items():
            self.opened[name].offset, self.opened[name].theta = offset.clone(), theta.clone()
        self._set()

    def result(self, name: str, before: Solved, linear: Linear) -> Solved:
        part = self.opened[name]
        weight = part.weight().to(linear.merged.device)
        if torch.equal(weight, to_device(before.weight, weight.device)):
            return before
        delta = linear.delta
        survival = delta_survival(weight, linear.merged - delta, delta) if delta is not None else None
        near = fit(weight, linear.merged)
        return replace(
            before,
            quantized=part.build(),
            weight=weight,
            distance=near.distance,
            slope=near.slope,
            survival=survival if survival == survival else None,
            bands=near.bands,
        )


def _move(part: Offsets, gradients: tuple[torch.Tensor, ...], turned: bool, lr: float, scale_lr: float) -> None:
    total = gradients[0].clone()
    for gradient in gradients[1:]:
        total += gradient
    total = total.cpu()
    by_offset, by_theta = part.pulls(total.T.contiguous() if turned else total)
    part.offset.sub_(_step(by_offset).mul_(lr)).clamp_(-BOUND, BOUND)
    part.theta.sub_(_step(by_theta).mul_(scale_lr))


def _step(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient by its root mean square, bounded. Its sign alone, as AutoRound takes it, moves what matters no more than what is noise; from the solver's codes that loses."""
    size = float(gradient.double().square().mean().sqrt())
    return (gradient / max(size, 1e-30)).clamp_(-MOST, MOST)
