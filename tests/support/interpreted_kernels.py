"""Run as a process of its own with TRITON_INTERPRET=1: the device kernels in Triton's interpreter against the plain tensor code. Prints what differs as JSON."""

from __future__ import annotations

import json

import torch

from qmerge.numerics import gptq, polish
from qmerge.numerics.gptq import ElementGrid
from qmerge.numerics.hessian import factor


def cases() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, rows, columns in (("whole blocks", 32, 128), ("odd", 35, 75), ("short", 3, 7)):
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, columns, generator=generator) * 0.1
        inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
        hessian = inputs.T @ inputs / len(inputs)
        scale = torch.rand(columns, rows, generator=generator) * 0.02 + 0.02
        grids = {"int": ElementGrid(scale, torch.full_like(scale, 7), 15), "book": ElementGrid(scale * 8, None, 15, torch.linspace(-1, 1, 16) ** 3)}
        for kind, grid in grids.items():
            found[f"{name}, {kind}"] = one(weight, hessian, grid)
    return found


def one(weight: torch.Tensor, hessian: torch.Tensor, grid: ElementGrid) -> dict[str, float]:
    """Share of codes that differ, and by how much the objective does, for rounding and for descent from the nearest codes."""
    level = factor(hessian, 0.01)
    matrix = polish.damped(hessian, 0.01)
    plain = gptq.solve(weight, level, grid)
    start = gptq.nearest(weight.T.contiguous(), grid)[0].T.contiguous()
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)

    def descended() -> torch.Tensor:
        current = gptq.values(start, grid)
        return polish._descend(start, current, (current - weight) @ matrix, matrix, order, grid, 2, 64)

    moved = descended()
    before = gptq._rounder, polish._sweeper
    gptq._rounder, polish._sweeper = lambda _: gptq._round_block_triton, lambda _: polish._sweep_triton
    try:
        ours, ours_moved = gptq.solve(weight, level, grid), descended()
    finally:
        gptq._rounder, polish._sweeper = before
    result = {"moved by descent": float((moved != start).float().mean())}
    for name, theirs, mine in (("rounding", plain, ours), ("descent", moved, ours_moved)):
        losses = [float((((gptq.values(codes, grid) - weight) @ matrix) * (gptq.values(codes, grid) - weight)).sum()) for codes in (theirs, mine)]
        result |= {name: float((theirs != mine).float().mean()), f"{name}, loss": losses[1] / losses[0] - 1}
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(cases()))
