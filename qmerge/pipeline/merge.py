"""What is each tensor of the merged model, in fp32, and is the merge right?

Rows are merged in stretches whose size depends on the tensor's shape alone, each by one thread: the same bits come out whatever the number of threads, the shard size or the
caller. Each stretch that an adapter changes is proved by another route.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

from qmerge.adapters.adapter import Adapter
from qmerge.adapters.edits import Change, Proof
from qmerge.adapters.regions import Region
from qmerge.device import runs_triton
from qmerge.errors import CheckFailed, Refused
from qmerge.formats.base import Base
from qmerge.formats.dense import cast
from qmerge.formats.rows import Reader
from qmerge.numerics.finite import all_finite
from qmerge.pipeline.pieces import Piece, Pieces
from qmerge.store.adapter import check_finite
from qmerge.types import Grid, QuantizedWeight, known

STRETCH = 1 << 20
"""elements of a tensor that are merged at a time: 4 MB in fp32, which stays near a core and is quickly allocated"""


@dataclass(frozen=True)
class Rows:
    """A merged stretch in fp32, with the base's rows where they were read, and what was added to them and its proof where an edit changed them."""

    start: int
    merged: torch.Tensor
    before: torch.Tensor | None = None
    added: torch.Tensor | None = None
    proof: Proof | None = None


def stretches(shape: tuple[int, ...], step: int = 1) -> list[tuple[int, int]]:
    """Row ranges of about ``STRETCH`` elements, starts at multiples of ``step``; a scalar is one row."""
    if not shape:
        return [(0, 1)]
    rows = max(1, STRETCH // max(prod(shape[1:]), 1) // step) * step
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)] or [(0, 0)]


class OpenPiece:
    """One tensor being merged: its base reader and the adapter's factors are in memory. Stretches may be asked for from several threads."""

    def __init__(self, piece: Piece, base: Base, device: torch.device) -> None:
        self.piece, self.device = piece, device
        self.change: Change | None = piece.edit.load(device) if piece.edit is not None else None
        self.base, self.reads = base, piece.source is not None and (piece.edit is None or piece.edit.needs_base)
        self.label = f"{base.checkpoint.name}: {piece.source}"
        whole = piece.cut is not None or (self.change is not None and not self.change.rowwise)
        self.step = piece.shape[0] if whole else base.row_step(known(piece.source)) if self.reads else 1
        self._lock = threading.Lock()
        self._reader: Reader | None = None

    def spans(self) -> list[tuple[int, int]]:
        """The stretches, first to last."""
        return stretches(self.piece.shape, self.step)

    def rows(self, start: int, stop: int, before: torch.Tensor | None = None) -> Rows:
        """Rows ``start`` … ``stop``, finite; ``before``: the base's, where the caller has read them. Raises Refused for NaN, Inf and overflow."""
        before, merged = self._merged(start, stop, before if self.reads else None)
        if not all_finite(merged):  # NaN and Inf of the base come through every edit
            check_finite(self.label, before)
            raise Refused("a merged weight is not finite in fp32", where=self.piece.name, found="overflow", fix="check the adapter's scaling", written="nothing")
        if self.change is None:
            return Rows(start, merged, before)
        if not self.reads:
            return Rows(start, merged, proof=self.change.prove(before, merged, start))
        added = merged - before
        return Rows(start, merged, before, added, self.change.prove(before, merged, start, added))

    def _merged(self, start: int, stop: int, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's rows and the merged ones. On a GPU a product of low rank is added in the pass that decodes, in the CPU's order of sums; whatever else an adapter does is torch's work there too."""
        product = self.change.product(start, stop) if self.change is not None and runs_triton(self.device) else None
        if product is not None:
            from qmerge.numerics import merge_kernels

            stored = self._open().coded(start, stop, self.device) if before is None and self.piece.cut is None else None
            return merge_kernels.merge(stored or (self._before(start, stop) if before is None else before), *product)
        before = self._before(start, stop) if before is None else before
        return before, before if self.change is None else self.change.apply(before, start)

    def _before(self, start: int, stop: int) -> torch.Tensor:
        if not self.reads:  # the adapter's own values: only the count of rows matters
            return torch.empty(stop - start, *self.piece.shape[1:], device=self.device)
        if self.piece.cut is not None:
            return cut_out(self.piece.cut, self._open(), self.device)
        return self._open().rows(start, stop, self.device)

    def _open(self) -> Reader:
        """The base's tensor, opened when first asked for: where outputs share its rows, one of them reads."""
        with self._lock:
            self._reader = self._reader or self.base.reader(known(self.piece.source), self.device)
            return self._reader


def cut_out(cut: Region, reader: Reader, device: torch.device) -> torch.Tensor:
    """One expert's weight, fp32 ``[out, in]``, from a tensor that holds those of all experts: no other expert is read."""
    height = cut.parameter_shape[1]
    rows = torch.arange(cut.parameter_shape[0] * height) if cut.rows is None else cut.rows
    first, last = int(rows.min()) // height, int(rows.max()) // height
    found = torch.empty(cut.shape, device=device)
    replace(cut, rows=rows - first * height).write_disk(found, reader.rows(first, last + 1, device))
    return found


def is_nf4(base: Base, name: str) -> bool:
    """Does the base hold (or does its recipe make) the weight in NF4?"""
    return base.quantized.get(name) == "nf4" or (name in base.fly and base.recipe is not None and base.recipe.quant_type == "nf4")


class Merged:
    """The merged model as tensors, by output name, computed when asked for."""

    def __init__(self, base: Base, pieces: Pieces, adapters: tuple[Adapter, ...], device: torch.device) -> None:
        self.base, self.pieces, self.adapters, self.device = base, pieces, adapters, device
        self.used: set[str] = set()
        self.proofs: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.pieces.table)

    def open(self, name: str) -> OpenPiece:
        return OpenPiece(self.pieces.table[name], self.base, self.device)

    def stretches(self, name: str) -> Iterator[Rows]:
        """All of a tensor, one stretch after the other; the whole is proved at the end."""
        opened = self.open(name)
        proof: Proof | None = None
        for start, stop in opened.spans():
            found = opened.rows(start, stop)
            proof = found.proof if proof is None else proof + known(found.proof)
            yield found
        if proof is not None:
            self.settle(name, proof)

    def settle(self, name: str, proof: Proof) -> None:
        """Judge a tensor's proof and note that the adapter's tensors went into it. Raises CheckFailed."""
        if proof.relative > proof.limit:
            raise CheckFailed("a merged weight is not what base and adapter give: the check that follows each merge failed", where=name, expected=f"a relative error of at most {proof.limit:.1e}", found=f"{proof.relative:.1e}", written="nothing", fix="run it again; if it fails at the same weight, the fault is in qmerge: please report it with what qmerge inspect says of base and adapter. Keep the adapter separate until then")
        with self._lock:
            self.proofs[name] = proof.relative
            self.used |= set(known(self.pieces.table[name].edit).keys)

    def used_before(self, names: Iterable[str]) -> None:
        """These tensors were merged, proved and written by an earlier process."""
        with self._lock:
            self.used |= {key for name in names if (edit := self.pieces.table[name].edit) is not None for key in edit.keys}

    def weight(self, name: str) -> torch.Tensor:
        """fp32; ``[out, in]`` for linears."""
        parts = [found.merged for found in self.stretches(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter of the module tree, fp32 (linears ``[out, in]``), put together where the output holds it in pieces."""
        parts = self.pieces.made_of.get(name)
        if parts is None:
            return self.weight(name)
        whole = torch.empty(parts[0][1].parameter_shape, device=self.device)
        for part, region in parts:
            region.write(whole, self.weight(part))
        return whole

    def four_bit(self, name: str, grid: Grid | None = None) -> QuantizedWeight | None:
        """The base's own NF4 form of a weight, or None where it has none, or what it is rounded to (``grid``) has no use for it."""
        if grid is not None and grid.kind == "int":
            return None
        source = self.pieces.table[name].source
        return self.base.four_bit(source, self.device) if source is not None and is_nf4(self.base, source) else None

    def delta(self, name: str) -> torch.Tensor | None:
        """What the adapter changes of a linear, fp32 ``[out, in]``, or None where it changes nothing."""
        if self.untouched(name):
            return None
        return torch.cat([found.added if found.added is not None else found.merged for found in self.stretches(name)])

    def untouched(self, name: str) -> bool:
        return self.pieces.table[name].edit is None

    def out_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that stays float: the base's."""
        return self.base.dtype(known(self.pieces.table[name].source))

    def float_tensor(self, name: str) -> torch.Tensor:
        """A tensor that stays float, in the base's dtype and file order: stored bytes where untouched, one cast otherwise. Raises Refused where the cast overflows."""
        source = self.pieces.table[name].source
        if source is not None and self.untouched(name) and self.pieces.table[name].cut is None and not self.base.encoded(source):
            stored = self.base.stored(source)
            check_finite(f"{self.base.checkpoint.name}: {source}", stored)
            return stored
        return cast(name, self.in_file_order(name, self.weight(name)), self.out_dtype(name)).cpu()

    def is_conv(self, name: str) -> bool:
        """Does a float checkpoint of this model store the weight ``[in, out]``?"""
        return self.pieces.table[name].source in self.base.conv

    def in_file_order(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` to the order in which a float checkpoint of this model stores the weight."""
        return weight.T.contiguous() if self.is_conv(name) else weight

    def check_all_used(self) -> None:
        """Every tensor of every adapter must have gone into the output, or be one that only training used."""
        for adapter in self.adapters:
            wanted = set(adapter.specs) - set(adapter.idle)
            if idle := sorted(wanted - self.used):
                raise CheckFailed("an adapter tensor changed no weight, though the plan had a place for it", where=f"{adapter.name}: {idle[0]}", found=f"{len(idle)} such tensors", written="nothing", fix="the fault is in qmerge: please report it with what qmerge inspect says of the adapter. Keep the adapter separate until then")
