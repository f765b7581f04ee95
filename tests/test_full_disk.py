"""A disk of 4 MB that is too small or becomes full: refused in the plan, or exit 75 and gone on with once there is room. A real tmpfs, in a mount namespace of a child's own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.forked import ended_within, fork
from support.resume import Jobs

from qmerge.pipeline import dense, streams

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000


@pytest.fixture(scope="module")
def jobs(zoo, tmp_path_factory):
    return Jobs(zoo, tmp_path_factory.mktemp("disk"))


def own_disk(place: Path, size: str) -> bool:
    """Give this process (a fresh child: it has one thread) a tmpfs at ``place`` that no other process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | (0 if os.geteuid() == 0 else NEW_USER)) != 0:
        return False
    subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True, check=False).returncode == 0


def mounts(tmp: Path) -> bool:
    return ended_within(fork(lambda: (_ for _ in ()).throw(SystemExit(0 if own_disk(tmp, "1m") else 1)), tmp / "log"), 30) == 0


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    if not mounts(tmp_path / "disk"):
        pytest.skip("this machine does not let us mount a tmpfs")
    return tmp_path / "disk"


def fill(place: Path, but: int = 0) -> None:
    """Leave ``but`` bytes free."""
    with (place / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            file.truncate(max(0, file.tell() - but))


def when(owner: Any, name: str, number: int, do: Any) -> None:
    inner, count = getattr(owner, name), [0]

    def called(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            do()
        return inner(*args, **options)

    setattr(owner, name, called)


def test_too_small_a_disk_is_refused(jobs, disk, tmp_path):
    """Hours of work whose result never had a place to go."""
    log = tmp_path / "log"

    def work() -> None:
        own_disk(disk, "4m")
        fill(disk, 20_000)
        code = jobs.run(disk / "out", "bf16")
        os.write(2, json.dumps(sorted(os.listdir(disk))).encode())
        raise SystemExit(code)

    assert ended_within(fork(work, log), 60) == 4
    assert "does not fit" in log.read_text() and '["ballast"]' in log.read_text()


@pytest.mark.parametrize("fmt", ["bf16", "gptq"])
def test_a_disk_that_becomes_full(jobs, disk, tmp_path, fmt):
    """Somebody else fills the disk at night: exit 75, what is finished stays, and with more room the same bytes come out."""
    jobs.reference(fmt)
    log = tmp_path / "log"

    def work() -> None:
        own_disk(disk, "4m")
        when(*((dense.ShardStream, "write", 14) if fmt == "bf16" else (streams, "requantize_group", 7)), lambda: fill(disk))
        codes = [jobs.run(disk / "out", fmt)]
        there = sorted(os.listdir(disk))
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        codes.append(jobs.run(disk / "out", fmt, "--resume"))
        (tmp_path / "found").write_text(json.dumps([codes, there, jobs.files(disk / "out") if (disk / "out").exists() else None, sorted(os.listdir(disk))]))

    assert ended_within(fork(work, log), 90) == 0, log.read_text()
    codes, there, files, after = json.loads((tmp_path / "found").read_text())
    said = log.read_text()
    assert codes == [75, 0], said
    assert there[0].startswith(".out.qmerge-run-") and there[1:] == ["ballast"]
    assert "no room left" in said and "make room" in said and "--resume" in said and "Traceback" not in said
    assert files == jobs.reference(fmt) and after == ["ballast", "out"]
