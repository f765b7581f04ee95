"""What is a moment of a run, and what is held in it? The words that the formulas of memory are written in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qmerge.pipeline.workload import Workload

FP32 = 4


@dataclass(frozen=True)
class Part:
    """``host``: in main memory whatever the device."""

    name: str
    nbytes: int
    host: bool = False


@dataclass(frozen=True)
class Phase:
    """One moment: what is held beside the interpreter and its libraries."""

    name: str
    parts: tuple[Part, ...]

    def ram(self, accelerator: bool) -> int:
        return sum(part.nbytes for part in self.parts if part.host or not accelerator)

    def on_device(self, accelerator: bool) -> int:
        return sum(part.nbytes for part in self.parts if not part.host) if accelerator else 0


def phase(name: str, host: Mapping[str, float], anywhere: Mapping[str, float]) -> Phase:
    """``host``: in main memory whatever the device; ``anywhere``: where it is computed with."""
    return Phase(name, (*(Part(key, round(value), True) for key, value in host.items() if value), *(Part(key, round(value)) for key, value in anywhere.items() if value)))


def lying(work: Workload, streams: Mapping[str, float], host: Mapping[str, float], anywhere: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """``host`` and ``anywhere`` with activations that lie where ``work`` says."""
    return ({**host, **streams}, dict(anywhere)) if work.streams_on_host else (dict(host), {**anywhere, **streams})


def hidden_bytes(work: Workload, tokens: int) -> int:
    """Hidden states of one stream."""
    return FP32 * tokens * work.hidden


def around(work: Workload) -> int:
    """Elements outside the blocks, but for embedding and head, which are there only while they are needed (pipeline.ends)."""
    return work.ends - work.end * (2 if work.ends >= 2 * work.end else 1)


def curvature_rows(work: Workload) -> int:
    """Elements of the curvatures of one block."""
    return sum(out * min(out, work.curvature_width) * group.copies for group in work.groups if group.copies == 1 for out in group.outputs)


def largest(many: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The one whose parts sum up to most."""
    found: Mapping[str, float] = max(many, key=lambda parts: sum(parts.values()), default={})
    return dict(found)


def scores(work: Workload, tokens: int, whole: bool = False) -> int:
    """Attention scores where they are formed ``whole``, or the model always forms them so: themselves, masked, and softmax."""
    return 3 * FP32 * tokens * work.tokens * work.heads if work.eager or whole else 0
