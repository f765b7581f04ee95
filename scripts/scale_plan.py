"""What would a run on many devices read, compute, send and hold, and about how long would it take? By formula; `docs/scale.md` holds what it prints, and says what of it was measured.

    python scripts/scale_plan.py [--tokens 262144] [--page docs/scale_plan.md]

Formulas follow the code: `numerics.hessian` (strips, slots), `pipeline.spread` (what ranks send each other), DESIGN section 9 (8.6 FLOP per parameter and token). Rates of devices and links are
assumptions, named in the output; nothing here was run on one. `tests/test_scale_plan.py` holds the bytes against those that small runs send.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qmerge.numerics.hessian import SLOTS, STRIP
from qmerge.pipeline import memory
from qmerge.pipeline.gradients import width_for
from qmerge.pipeline.workload import Linears, Workload

FP32 = 4
STORED = 0.52
"""bytes per weight in 4 bits with its scales"""
SENT = 0.62
"""bytes per weight of a solved linear as ranks hand it on: codes two to a byte, scales and zeros in fp32"""


@dataclass(frozen=True)
class Group:
    """Linears with one input. ``writer``: added to the residual stream. ``copies``: as many in a block (experts); ``share`` of the tokens reaches each."""

    inputs: int
    outputs: tuple[int, ...]
    writer: bool = False
    copies: int = 1
    share: float = 1.0

    @property
    def elements(self) -> int:
        return self.inputs * sum(self.outputs)


@dataclass(frozen=True)
class Model:
    name: str
    blocks: int
    hidden: int
    vocabulary: int
    groups: tuple[Group, ...]

    @property
    def parameters(self) -> float:
        return self.blocks * sum(group.elements * group.copies for group in self.groups) + 2 * self.vocabulary * self.hidden

    @property
    def active(self) -> float:
        """Parameters that a token meets in the blocks."""
        return self.blocks * sum(group.elements * group.copies * group.share for group in self.groups)


def llama(name: str, blocks: int, hidden: int, ffn: int, kv: int, vocabulary: int = 128256) -> Model:
    groups = (Group(hidden, (hidden, kv, kv)), Group(hidden, (hidden,), True), Group(hidden, (ffn, ffn)), Group(ffn, (hidden,), True))
    return Model(name, blocks, hidden, vocabulary, groups)


def experts(name: str, blocks: int, hidden: int, heads: int, kv: int, ffn: int, count: int, chosen: int, vocabulary: int = 163840) -> Model:
    share = chosen / count
    groups = (Group(hidden, (heads, kv, kv)), Group(heads, (hidden,), True), Group(hidden, (ffn, ffn), copies=count, share=share), Group(ffn, (hidden,), copies=count, share=share))
    return Model(name, blocks, hidden, vocabulary, groups)


MODELS = (llama("8B", 32, 4096, 14336, 1024), llama("70B", 80, 8192, 28672, 1024), llama("405B", 126, 16384, 53248, 1024), experts("1T of experts", 61, 7168, 8192, 1024, 2048, 384, 8))


@dataclass(frozen=True)
class Machine:
    """Assumptions. FLOP/s that products of fp32 and of bf16 factors reach (half of what the maker names; `--compute auto` passes text and sums in bf16 there, and solves in fp32), bytes/s of a device's link to others and of
    the disk."""

    name: str = "H200, 8 to a host"
    flops: float = 4.5e13
    bf16: float = 5.0e14
    fp64: float = 3.0e13
    memory: float = 141e9
    link: float = 40e9
    disk: float = 5e9
    column_s: float = 2e-5
    """a column of the solver's loop, all rows side by side"""


def triangle(inputs: int) -> int:
    """Elements of H that are summed: strips of its lower half."""
    return sum((min(start + STRIP, inputs) - start) * min(start + STRIP, inputs) for start in range(0, inputs, STRIP))


def sum_elements(group: Group) -> int:
    """H, D and the residual's product."""
    return triangle(group.inputs) + group.inputs**2 + (group.elements if group.writer else 0)


def solvers(group: Group, ranks: int) -> int:
    return min(ranks, len(group.outputs))


def sent_sums(group: Group, ranks: int, slots: int) -> float:
    """Bytes that all ranks together give each other so that the solvers of a group have its sums. ``slots``: of the windows to solve on and of the others, together; two sums."""
    across = (ranks - 1) / ranks
    return FP32 * sum_elements(group) * (slots + 2 * solvers(group, ranks)) * across


def sent_block(model: Model, ranks: int, tokens: int, slots: int = 2 * SLOTS) -> float:
    """Bytes of one block: sums, what reaches the experts (both streams, to every rank), and solved linears (counted once each)."""
    if ranks == 1:
        return 0.0
    found = sum(sent_sums(group, ranks, slots) for group in model.groups if group.copies == 1)
    if any(group.copies > 1 for group in model.groups):
        found += 2 * FP32 * tokens * model.hidden * (ranks - 1)
    return found + SENT * sum(group.elements * group.copies for group in model.groups)


@dataclass(frozen=True)
class Costs:
    """Of a whole run. Seconds on `Machine`, by part; ``device_bytes`` at the fullest moment of one rank."""

    ranks: int
    read_bytes: float
    flop: float
    sent_bytes: float
    device_bytes: float
    seconds: dict[str, float]

    @property
    def elapsed_s(self) -> float:
        return sum(self.seconds.values())


def flop_sums(group: Group, tokens: float) -> float:
    """H (half of it), D, and the residual's product: products of tokens."""
    return 2 * tokens * sum_elements(group)


def costs(model: Model, ranks: int, tokens: int, machine: Machine) -> Costs:
    """A gptq run without gradients. What is split: forwards and sums by slots, linears by group, experts by expert; loading a block and the solver's columns are not."""
    working = min(ranks, SLOTS)
    forward = 4 * model.active * tokens
    sums = solve = factor = 0.0
    chain = 0.0
    for group in model.groups:
        here = tokens * group.share
        split = working if group.copies == 1 else min(ranks, group.copies)
        sums += model.blocks * group.copies * flop_sums(group, here) / split
        side = min(ranks, group.copies) if group.copies > 1 else 1
        factor += model.blocks * group.copies * 2.5 * group.inputs**3 / side
        of_one = group.elements / (len(group.outputs) if group.copies == 1 and ranks >= len(group.outputs) else 1)
        solve += model.blocks * group.copies * 6 * group.inputs * of_one / side
        chain += model.blocks * group.copies * 3 * group.inputs * machine.column_s / side
    total = forward + sum(model.blocks * group.copies * flop_sums(group, tokens * group.share) for group in model.groups)
    sent = model.blocks * sent_block(model, ranks, tokens)
    # a rank reads every block, so the disk is read once per host from its cache's point of view; the devices of a host share it
    read = STORED * model.parameters
    seconds = {
        "read": read / machine.disk, "forwards": forward / working / machine.bf16, "sums": sums / machine.bf16, "factor": factor / machine.fp64, "solve": solve / machine.flops + chain,
        "send": sent / ranks / machine.link if ranks > 1 else 0.0, "write": STORED * model.parameters / machine.disk,
    }  # fmt: skip
    block = FP32 * 2 * sum(group.elements * group.copies for group in model.groups)
    streams = 2 * FP32 * tokens * model.hidden / working
    largest = max(4 * 2 * FP32 * group.inputs**2 + 46 * group.inputs**2 for group in model.groups)
    return Costs(ranks, read, total, sent, block + streams + largest, seconds)


WINDOW = 2048
"""tokens of a calibration window"""


def workload(model: Model, tokens: int) -> Workload:
    """What `qmerge.pipeline.memory` has to know of a gptq run of the model on one accelerator, from an NF4 base."""
    groups = tuple(Linears(group.inputs, group.outputs, group.writer, True, group.copies) for group in model.groups)
    inside = sum(group.elements * group.copies for group in groups)
    end, windows = model.vocabulary * model.hidden, tokens // WINDOW
    held_out = max(1, windows // 7)
    width = width_for([out for group in groups for out in group.outputs] * model.blocks)
    return Workload(16, True, "gptq", model.hidden, model.vocabulary, 2 * end + model.hidden, end, model.blocks, inside + 2 * model.hidden, groups, None, max(max(group.inputs, *group.outputs) for group in groups), model.hidden // 128,
                    False, True, windows - held_out, held_out, WINDOW, 8192, width, model.blocks * inside, model.blocks * inside + 2 * end, 0, max(group.inputs * max(group.outputs) for group in groups), factor_bytes=2)  # fmt: skip


def one_device(tokens: int) -> list[str]:
    """A table: what one accelerator holds at most, with both streams of activations there and in main memory (`--device-memory`)."""
    lines = ["| model | device, streams there | device, streams in main memory | the moment that decides | main memory then |", "|---|---|---|---|---|"]
    for model in (model for model in MODELS if all(group.copies == 1 for group in model.groups)):
        here = workload(model, tokens)
        there = replace(here, streams_on_host=True)
        found = [memory.phases(work, 5 * 10**9, round(STORED * model.parameters)) for work in (here, there)]
        peaks = [max(phase.on_device(True) for phase in phases) for phases in found]
        fullest = max(found[1], key=lambda phase: phase.on_device(True))
        ram = max(phase.ram(True) for phase in found[1])
        lines.append(f"| {model.name} | {peaks[0] / 1e9:.1f} GB | {peaks[1] / 1e9:.1f} GB | {fullest.name}: {max((part for part in fullest.parts if not part.host), key=lambda part: part.nbytes).name} | {ram / 1e9:.0f} GB |")
    return lines


def page(tokens: int, machine: Machine, counts: Sequence[int]) -> str:
    """Tables for people."""
    lines = ["# Past what can be run here, by formula", "", f"Written by `scripts/scale_plan.py`. {tokens} calibration tokens. Assumed, not measured: {machine.name}, {machine.flops:.2g} FLOP/s in fp32, {machine.bf16:.2g} in bf16, "
             f"{machine.fp64:.2g} in fp64, {machine.link / 1e9:.0f} GB/s between devices, {machine.disk / 1e9:.0f} GB/s of disk, {machine.column_s * 1e6:.0f} µs for a column of the solver's loop. Gradients (`--curvature-tokens`) are not counted. "
             "*a device holds* counts coarsely: streams on it, every sum, and all rows of a linear at once; the table at the end counts as the check before a run does.", ""]  # fmt: skip
    for model in MODELS:
        lines += [f"## {model.name}: {model.parameters / 1e9:.0f} billion parameters, {model.active / 1e9:.0f} active", "",
                  "| devices | reads | FLOP | sent per block | sent | a device holds | " + " | ".join(("read", "forwards", "sums", "factor", "solve", "send", "write")) + " | all |", "|" + "---|" * 14]  # fmt: skip
        for ranks in counts:
            found = costs(model, ranks, tokens, machine)
            fits = "" if found.device_bytes <= machine.memory else " (does not fit)"
            cells = [str(ranks), f"{found.read_bytes / 1e9:.0f} GB", f"{found.flop:.2g}", f"{found.sent_bytes / model.blocks / 1e9:.1f} GB", f"{found.sent_bytes / 1e12:.2f} TB", f"{found.device_bytes / 1e9:.0f} GB{fits}"]
            lines.append("| " + " | ".join([*cells, *(f"{value:.0f} s" for value in found.seconds.values()), f"{found.elapsed_s / 60:.0f} min"]) + " |")
        lines.append("")
    lines += ["## One device: what it holds at most", "", f"By the formulas of the check before a run (`qmerge.pipeline.memory`), not measured on a device: gptq from an NF4 base, {tokens} tokens in windows of {WINDOW}, `--compute bf16`. CUDA's own memory (some 0.5 GB) comes on top.", "",
              *one_device(tokens), ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--tokens", type=int, default=262144)
    words.add_argument("--ranks", default="1,8,16,64")
    words.add_argument("--page")
    wish = words.parse_args()
    told = page(wish.tokens, Machine(), [int(count) for count in wish.ranks.split(",")])
    if wish.page:
        Path(wish.page).write_text(told)
    print(told)


if __name__ == "__main__":
    main()
