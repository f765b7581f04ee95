"""Which cells does the support matrix have, and how does it read as a page?

The cells are data: the page says what the tests of tests/test_support_matrix.py hold, cell by cell, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from support.adapters import TOLERANCE, Blank, Cell, Exact, Refusal
from support.architectures import ARCHITECTURES, Architecture
from support.bases import KINDS
from support.bench import MOVED
from support.features import FEATURES, Feature, lora
from support.several import COLUMNS, SEVERAL, TYPES

TYPES_GROUP, BASES_GROUP = "PEFT types beside LoRA", "Bases"
MEASURED = "Measured when this page was written"
REGENERATE = "python -m pytest tests/test_support_matrix.py -m 'slow or not slow' --write-support"


@dataclass(frozen=True)
class Place:
    """One cell: where it stands, and on which kind of base it is tested."""

    group: str
    row: str
    architecture: str
    base: str
    cell: Cell

    @property
    def id(self) -> str:
        return f"{self.row} | {self.architecture}".replace("[", "(").replace("]", ")")


def on_base(name: str, adapter: str) -> Feature:
    """A plain LoRA, a DoRA, or a LoRA on fused experts, on one kind of base."""

    def cell(arch: Architecture) -> Cell:
        kind = KINDS[name]
        if name == "nf4-experts" and not arch.apart:
            return Blank("no experts that were once linears")
        if name == "awq" and arch.key == "gpt2":
            return Blank("AWQ GEMM replaces `nn.Linear` only")
        if adapter == "experts":
            return Exact(lora(arch, target_parameters=list(arch.fused), target_modules=[])) if arch.fused else Blank("no fused experts")
        case = Exact(lora(arch, use_dora=adapter == "DoRA"))
        if adapter == "DoRA" and kind.pack is not None and kind.flags.get("on") == "original":
            return Refusal("magnitudes were trained over the quantized base", "DoRA's magnitudes belong to the quantized base", case)
        return case

    return cell


def _base_rows() -> dict[str, tuple[str, Feature]]:
    rows = {}
    for name, kind in KINDS.items():
        for adapter in ("LoRA", "DoRA", "experts"):
            wanted = adapter != "experts" or name in ("nf4", "nf4-experts", "gptq", "awq", "float", "recipe-double")
            if wanted:
                rows[f"{kind.title}: {'LoRA on fused experts' if adapter == 'experts' else adapter}"] = (name, on_base(name, adapter))
    return rows


def places() -> Iterator[Place]:
    for group, rows in (FEATURES | SEVERAL).items():
        for row, feature in rows.items():
            yield from (Place(group, row, key, "nf4", feature(arch)) for key, arch in ARCHITECTURES.items())
    for row, (base, feature) in _base_rows().items():
        yield from (Place(BASES_GROUP, row, key, base, feature(arch)) for key, arch in ARCHITECTURES.items())
    for row, feature in TYPES.items():
        yield from (Place(TYPES_GROUP, row, key, "nf4", feature(ARCHITECTURES[key])) for key in COLUMNS)


def in_every_run() -> set[str]:
    """Of each row every third exact cell, another one to begin with in each row, so that every row and every column is there: the ids of what a default run tests. The others are slow."""
    rows: dict[tuple[str, str], list[Place]] = {}
    for place in places():
        if isinstance(place.cell, Exact):
            rows.setdefault((place.group, place.row), []).append(place)
    return {place.id for number, cells in enumerate(rows.values()) for place in cells[number % min(3, len(cells)) :: 3]}


INTRODUCTION = f"""# What is merged, and what is refused

This page is written by tests/test_support_matrix.py (`{REGENERATE}`), and a test fails when it says something else than the tests do. `make test` runs every refusal and a third of the exact cells, CI all of them.

**exact**: `qmerge merge --format fp32`, loaded by transformers in fp32, gives the logits of the separate model: PEFT's adapter on the dequantized base in fp32.
The largest difference is at most {TOLERANCE:g} of the largest logit (where a note says so, another share), and the adapter moves the logits by at least {MOVED:g} of it. Both sides compute in fp32 and differ in the
order of summation alone, (W + s·BA)x against Wx + s·B(Ax). Other formats add one cast of each weight. **refused**: a message says why, and nothing is written.
**—**: no such adapter can exist there. Numbers lead to the notes below each table.

Unless a row says otherwise the base is NF4 with double quantization. Models have two layers of width 64, with random weights.
"""


def render(measured: dict[str, float] | None = None) -> str:
    """The page. ``measured``: group -> largest difference, where all cells were tested just now."""
    groups: dict[str, dict[str, list[Place]]] = {}
    for place in places():
        groups.setdefault(place.group, {}).setdefault(place.row, []).append(place)
    parts = [INTRODUCTION]
    for group, rows in groups.items():
        notes: list[str] = []
        titles = [ARCHITECTURES[place.architecture].title for place in next(iter(rows.values()))]
        lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
        lines += [f"| {row} | " + " | ".join(_text(place.cell, notes) for place in cells) + " |" for row, cells in rows.items()]
        parts.append(f"## {group}\n\n" + "\n".join(lines) + "\n")
        if notes:
            parts.append("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)) + "\n")
        if measured and group in measured:
            parts.append(f"{MEASURED}: at most {measured[group]:.1e}.\n")
    return "\n".join(parts)


def _text(cell: Cell, notes: list[str]) -> str:
    text, note = {Exact: ("exact", getattr(cell, "note", None)), Refusal: ("refused", getattr(cell, "why", None)), Blank: ("—", getattr(cell, "why", None))}[type(cell)]
    if note is None:
        return text
    if note not in notes:
        notes.append(note)
    return f"{text} ({notes.index(note) + 1})"
