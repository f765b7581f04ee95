"""Was this process started as one of several, by torchrun or Slurm, and which one is it?

Nothing here imports torch: every command asks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qmerge.errors import UsageProblem

PORTS = 20_000, 20_000
"""first port and how many, that a Slurm job step's own number chooses among"""


@dataclass(frozen=True)
class Launch:
    """``rank`` of ``size`` processes, and among those of its host. ``host:port``: where they meet; ``hosted``: by the launcher, which outlives them; ``attempt``: of the launcher's restarts."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    hosted: bool = False
    attempt: str = "0"


def launched(environ: Mapping[str, str]) -> Launch | None:
    """What torchrun (or whoever sets its variables) or ``srun`` says; None where the process is alone. A Slurm allocation without ``srun`` starts one process, which is alone.

    Raises UsageProblem where the variables contradict each other.
    """
    try:
        found = _torchrun(environ) or _slurm(environ)
    except (KeyError, ValueError) as problem:
        raise UsageProblem("The variables that say which of several processes this is are not whole.", where=str(problem).strip("'"), expected="RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
                           fix="start with torchrun or srun; or unset WORLD_SIZE to run alone") from None
    if found is None or found.size == 1:
        return None
    if not 0 <= found.rank < found.size or not 0 <= found.local_rank < found.local_size:
        raise UsageProblem("A process's number is not below their count.", found=f"rank {found.rank} of {found.size}, {found.local_rank} of {found.local_size} here", fix="start with torchrun or srun")
    return found


def _torchrun(environ: Mapping[str, str]) -> Launch | None:
    if "WORLD_SIZE" not in environ or int(environ["WORLD_SIZE"]) <= 1:
        return None
    local = int(environ["LOCAL_RANK"])
    return Launch(
        int(environ["RANK"]), int(environ["WORLD_SIZE"]), local, int(environ.get("LOCAL_WORLD_SIZE", local + 1)), environ["MASTER_ADDR"], int(environ["MASTER_PORT"]),
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )  # fmt: skip


def _slurm(environ: Mapping[str, str]) -> Launch | None:
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) <= 1 or "SLURM_PROCID" not in environ:
        return None
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    host = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
    port = int(environ.get("MASTER_PORT") or PORTS[0] + (job * 16 + step) % PORTS[1])
    here = tasks_on(environ["SLURM_STEP_TASKS_PER_NODE"], int(environ.get("SLURM_NODEID", 0)))
    return Launch(int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_LOCALID"]), here, host, port)


def first_host(nodes: str) -> str:
    """Of a Slurm node list: ``first_host("gpu[07-09,12],login1") == "gpu07"``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}")
    return "".join(part or "" for part in found.groups())


def tasks_on(counts: str, node: int) -> int:
    """``tasks_on("4(x2),1", 2) == 1``: how many tasks Slurm runs on a node of a step."""
    spread = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    return spread[node] if node < len(spread) else spread[-1]
