"""How are the routed experts of a layer requantized, each on the tokens that are routed to it?

The run-time stream decides who is routed where. An expert's teacher is itself in the separate model, at the same tokens in the teacher's stream, whether the teacher's router sent
them there or not: its weights are then aimed at what that very expert answers, which stays defined where the two routers disagree. An expert's inputs are what meets its slice of a
fused parameter while transformers' own loop over experts runs, so nothing is assumed about what lies between its linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qmerge.device import in_parallel, to_device, worker_threads
from qmerge.errors import Refused
from qmerge.numerics.hessian import Statistics
from qmerge.pipeline.batches import Shelf
from qmerge.pipeline.candidates import Linear
from qmerge.pipeline.experts_names import ExpertWeight
from qmerge.pipeline.merge import Merged
from qmerge.pipeline.requantize import Solved
from qmerge.pipeline.spread import Spread, handed
from qmerge.ranks import ALONE, Ranks
from qmerge.types import known

ARRIVALS = "arrivals"
"""a module that experts get, which does nothing but receive what they receive"""
FEW = 1 / 3
"""tokens per input feature below which an expert has too few: at 1/4 sums over all tokens of the layer gave smaller errors than its own in the lab (0.65 against 0.78 of plain
rounding's where experts see much the same, 0.79 against 0.69 where they do not), at 1/2 its own did (0.60 against 0.64, 0.52 against 0.78)"""
FEW_HELD_OUT = 16
"""held-out tokens below which those of all the layer choose"""
POOLED, NEAREST = "pooled", "rtn"


@dataclass(frozen=True)
class Traffic:
    """What one expert's weight was solved on: ``tokens`` routed to it, of which ``held_out`` chose; ``statistics`` ``own``, ``pooled`` (all tokens of its layer) or ``rtn``."""

    expert: str
    tokens: int
    held_out: int
    least: int
    statistics: str

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "held_out_tokens": self.held_out, "statistics": self.statistics}


@dataclass(frozen=True)
class Arrived:
    """What came to the experts of a layer in one batch, as `receive` makes it: ``runtime`` and ``teacher`` are ``[tokens, hidden + k + 1]``, both where streams lie."""

    runtime: torch.Tensor
    teacher: torch.Tensor
    held_out: bool

    @property
    def hidden(self) -> int:
        return self.runtime.shape[1] - 1 - int(self.runtime[0, -1])

    def routed(self, expert: int) -> torch.Tensor:
        """bool ``[tokens]``: which of them does the run-time router send to ``expert``?"""
        return (self.runtime[:, self.hidden : -1] == expert).any(1)

    def tokens(self, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(run-time, teacher) hidden states of the tokens of ``expert``; None: of all."""
        rows = slice(None) if expert is None else self.routed(expert)
        return self.runtime[rows, : self.hidden], self.teacher[rows, : self.hidden]


def everywhere(spread: Spread, own: dict[int, Arrived], shelf: Shelf) -> list[Arrived]:
    """What came in each batch, in the order of the batches, on all ranks. ``own``: by the number of the batch."""
    ranks, found = spread.ranks, []
    if ranks.alone:
        return list(own.values())
    owners = {number: rank for rank, numbers in enumerate(ranks.hear(list(own))) for number in numbers}
    for number in range(spread.batches):
        here = own.get(number)
        record = None if here is None else ({"held_out": here.held_out}, {"runtime": here.runtime.cpu().contiguous(), "teacher": here.teacher.cpu().contiguous()})
        facts, tensors = ranks.hand(record, owners[number])
        if here is None:
            runtime, teacher = (tensors[name] if shelf.host else shelf.take(tensors[name]) for name in ("runtime", "teacher"))
            here = Arrived(runtime, teacher, facts["held_out"])
        found.append(here)
    return found


def receive(block: nn.Module, names: Iterable[str]) -> None:
    """Let experts (names within ``block``) pass on what comes to them to a module ``ARRIVALS`` of theirs, where hooks can see it: one tensor, a token's row being its hidden state,
    the numbers of the k experts that it goes to, and k."""

    def announce(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        chosen = next(value for value in others if not value.is_floating_point())
        hidden = hidden.reshape(-1, hidden.shape[-1]).float()  # numbers of experts go along with it
        chosen = chosen.reshape(hidden.shape[0], -1).to(hidden)
        experts.get_submodule(ARRIVALS)(torch.cat([hidden, chosen, torch.full_like(chosen[:, :1], chosen.shape[1])], dim=1))

    for name in names:
        experts = block.get_submodule(name)
        experts.add_module(ARRIVALS, nn.Identity())
        experts.register_forward_pre_hook(announce, with_kwargs=True)


class _Stop(Exception):
    """Ends an expert's pass once its inputs are there."""


class _Meetings(TorchFunctionMode):
    """What meets a slice of each parameter of an experts module, by the parameter's name; with ``last``, the pass ends there."""

    def __init__(self, experts: nn.Module, last: str | None = None) -> None:
        super().__init__()
        self.places = {parameter.untyped_storage().data_ptr(): name for name, parameter in experts.named_parameters(recurse=False)}
        self.last = last
        self.inputs: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and isinstance(args[0], torch.Tensor) and isinstance(args[1], torch.Tensor):
            name = self.places.get(args[1].untyped_storage().data_ptr())
            if name is not None and args[1].dim() == 2 and args[0].untyped_storage().data_ptr() not in self.places:
                self.inputs.setdefault(name, args[0])
                if name == self.last:
                    raise _Stop
        return func(*args, **(kwargs or {}))


def expert_inputs(experts: nn.Module, expert: int, parameter: str | None, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What one expert's slices of its parameters meet, in the order in which they do, when ``tokens`` ``[n, hidden]`` go to it alone; up to ``parameter``."""
    chosen = torch.full((tokens.shape[0], 1), expert, device=tokens.device)
    met = _Meetings(experts, parameter)
    with torch.no_grad(), met:
        try:
            experts.forward(tokens, chosen, tokens.new_ones(tokens.shape[0], 1))  # not by a call: hooks are for what the model itself sends
        except _Stop:
            pass
    return met.inputs


@dataclass
class ExpertSolver:
    """The experts of one layer. ``teacher`` and ``runtime`` are the module in the separate model and as requantized so far (written to in place)."""

    weights: list[ExpertWeight]
    teacher: nn.Module
    runtime: nn.Module
    arrived: list[Arrived]
    merged: Merged
    solve: Callable[[list[Linear], Statistics, Statistics], list[Solved]]
    nearest: Callable[[Linear], Solved]
    low_traffic: str = POOLED
    ranks: Ranks = ALONE
    model_dtype: torch.dtype = torch.float32
    solved: dict[str, Solved] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = self.merged.device
        by_expert: dict[int, dict[str, list[ExpertWeight]]] = {}
        for weight in self.weights:
            by_expert.setdefault(weight.expert, {}).setdefault(weight.parameter.rpartition(".")[2], []).append(weight)
        self.by_expert = dict(sorted(by_expert.items()))
        self.order = self._order()
        self._all: dict[str, Statistics] = {}

    def run(self) -> None:
        """Solve expert by expert, each parameter on the inputs that the ones before it make as they now are. No expert needs another, so each rank solves some of them."""
        for place, (expert, parameters) in enumerate(self.by_expert.items()):
            for name in (name for name in self.order if name in parameters and place % self.ranks.size == self.ranks.rank):
                self._one(expert, name, parameters[name])
        if not self.ranks.alone:
            self._exchange()

    def _exchange(self) -> None:
        """What each rank has solved, on all of them, in the order in which one alone would have."""
        own, traffic = self.solved, {name: row for rows in self.ranks.hear({name: asdict(row) for name, row in self.traffic.items()}) for name, row in rows.items()}
        self.solved, self.traffic = {}, {}
        for place, parameters in enumerate(self.by_expert.values()):
            for weight in (weight for name in self.order for weight in parameters.get(name, ())):
                (result,) = handed(self.ranks, [place % self.ranks.size], [weight.name], own, self.model_dtype, self.device)
                if weight.name not in own:
                    weight.region.write(self.runtime.get_parameter(weight.parameter.rpartition(".")[2]).data, result.weight)
                self.solved[weight.name], self.traffic[weight.name] = result, Traffic(**traffic[weight.name])

    def _one(self, expert: int, name: str, weights: list[ExpertWeight]) -> None:
        whole = self.teacher.get_parameter(name)
        linears = [Linear(weight.name, weight.region.read(whole), self.merged.four_bit(weight.name), self.merged.delta(weight.name)) for weight in weights]
        counts = {held: sum(int(batch.routed(expert).sum()) for batch in self.arrived if batch.held_out is held) for held in (False, True)}
        least = max(1, round(FEW * linears[0].merged.shape[1]))
        few = counts[False] < least
        if few and self.low_traffic == NEAREST:
            found = [self.nearest(linear) for linear in linears]
        else:
            found = self.solve(linears, self._statistics(expert, name, few, False), self._statistics(expert, name, counts[True] < FEW_HELD_OUT, True))
        traffic = Traffic(f"{weights[0].module}.{expert}", counts[False], counts[True], least, self.low_traffic if few else "own")
        for weight, result in zip(weights, found, strict=True):
            weight.region.write(self.runtime.get_parameter(name).data, result.weight)
            self.solved[weight.name], self.traffic[weight.name] = result, traffic

    def _statistics(self, expert: int, name: str, pooled: bool, held_out: bool) -> Statistics:
        """Over the tokens routed to the expert, or ``pooled`` over all that come to its layer, of the windows to solve on or of those to choose with."""
        first = name == self.order[0]  # all experts see the same tokens here, so pooled sums are formed once
        key = f"{name} {held_out}"
        if pooled and first and key in self._all:
            return self._all[key]
        batches = [batch for batch in self.arrived if batch.held_out is held_out]
        step, found = worker_threads(self.device), None
        for start in range(0, len(batches), step):  # a few batches' inputs at a time
            pairs = in_parallel(lambda batch: self._pair(batch, None if pooled else expert, expert, name), batches[start : start + step], self.device)
            parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = [(runtime, teacher, None) for runtime, teacher in pairs if runtime.shape[0]]
            if parts:
                found = found or Statistics(parts[0][0].shape[1], self.device)
                found.add_all(parts)
        if pooled and first:
            self._all[key] = known(found)
        return known(found)

    def _pair(self, batch: Arrived, routed: int | None, expert: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._here(batch, routed)
        if not tokens[0].shape[0]:
            return tokens
        return expert_inputs(self.runtime, expert, name, tokens[0])[name], expert_inputs(self.teacher, expert, name, tokens[1])[name]

    def _here(self, batch: Arrived, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of a batch on the device."""
        runtime, teacher = batch.tokens(expert)
        found = to_device(runtime, self.device), to_device(teacher, self.device)
        return found if self.device.type == "cpu" else (found[0].contiguous(), found[1].contiguous())  # the same from either side

    def _order(self) -> list[str]:
        """The parameters in the order in which an expert meets them. Refused where it meets none of its own slice, or not with inputs one token a row."""
        wanted = {weight.parameter.rpartition(".")[2]: weight.region.shape[1] for weight in self.weights}
        tokens = self._here(self.arrived[0], None)[0][:2]
        met = expert_inputs(self.runtime, self.weights[0].expert, None, tokens)
        for name, width in wanted.items():
            if name not in met or tuple(met[name].shape) != (tokens.shape[0], width):
                raise Refused("this version cannot tell what the routed experts of this model compute with", where=f"{self.weights[0].module}.{name}", expected=f"inputs [tokens, {width}] that meet one expert's slice",
                              found=str(list(met[name].shape)) if name in met else "none", fix="use --format nf4, which keeps experts float, --rtn or --format bf16")
        return [name for name in met if name in wanted]


def few_tokens(traffic: Iterable[Traffic]) -> str | None:
    """One line that names the experts that saw too few tokens, None where none did."""
    low: dict[str, Traffic] = {}
    for found in traffic:
        if found.statistics != "own":
            low.setdefault(found.expert, found)
    if not low:
        return None
    least, ways = max(found.least for found in low.values()), sorted({found.statistics for found in low.values()})
    names = ", ".join(f"{name} ({found.tokens})" for name, found in list(low.items())[:8]) + (" …" if len(low) > 8 else "")
    done = " and ".join({POOLED: "solved on all tokens of their layers", NEAREST: "rounded to nearest"}[way] for way in ways)
    return f"{len(low)} experts saw fewer than {least} tokens and were {done}: {names}; all in manifest.json"
