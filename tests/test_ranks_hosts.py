"""Several processes as torchrun starts them, on several hosts, and with routed experts: the bytes of one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OWN, run_cli, sentences, write_rows
from support.hosts import ends, environment, on_hosts, pull, two_hosts
from support.ranks import end, free_port, start
from test_requantize_architectures import Shop

from qmerge.pipeline import batches, gradients

LIMIT_S = 300
pytestmark = pytest.mark.slow


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("key", ["qwen3_moe", "mixtral"])
def test_experts_are_shared(zoo, tmp_path, key):
    """An expert that is solved on the tokens of one rank alone, or whose result another rank's text does not pass."""
    found = Shop(tmp_path, zoo).inputs(key)
    text, log = write_rows(tmp_path / "text.jsonl", sentences(OWN, 200, 5)), tmp_path / "log"

    def words(out: Path) -> list[object]:
        return ["merge", "--base", found.base, "--adapter", found.adapter, "--out", out, "--format", "gptq", "--device", "cpu", "--calibration", text, "--samples", 12, "--tokens", 32,
                "--group-size", 32, "--curvature-tokens", 64]  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "TOKENS_PER_BATCH", 32)
        patch.setattr(gradients, "BATCH", 32)
        assert run_cli(*words(tmp_path / "one")).code == 0

    def work() -> None:
        batches.TOKENS_PER_BATCH = gradients.BATCH = 32
        answer = run_cli(*words(tmp_path / "three"))
        os.write(2, answer.err.encode())
        raise SystemExit(answer.code)

    assert end(start([work] * 3, log), LIMIT_S) == [0, 0, 0], log.read_text()[-3000:]
    assert files(tmp_path / "three") == files(tmp_path / "one")


def command(zoo, tmp_path: Path, out: Path) -> list[str]:
    text = tmp_path / "text.jsonl"
    if not text.exists():
        write_rows(text, sentences(OWN, 600, 5))
    words = ["-m", "qmerge", "merge", "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"), "--out", out, "--format", "gptq", "--device", "cpu", "--calibration", text, "--samples", 120, "--tokens", 128,
             "--curvature-tokens", 256]  # fmt: skip
    return [str(word) for word in words]


def one(zoo, tmp_path: Path) -> dict[str, str]:
    subprocess.run([sys.executable, *command(zoo, tmp_path, tmp_path / "one")], env=environment(), check=True, capture_output=True, timeout=LIMIT_S)
    return files(tmp_path / "one")


def test_torchrun(zoo, tmp_path):
    """What the manual tells people to type."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), *command(zoo, tmp_path, tmp_path / "two")]
    found = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert found.returncode == 0, found.stderr[-3000:]
    assert files(tmp_path / "two") == one(zoo, tmp_path)
    assert found.stdout.strip() == str(tmp_path / "two"), "one rank alone talks"


def test_two_hosts(zoo, tmp_path):
    """Addresses that only one of the hosts has."""
    with two_hosts() as names:
        codes, told = ends(on_hosts(names, command(zoo, tmp_path, tmp_path / "two")), LIMIT_S)
    assert codes == [0, 0], told
    assert files(tmp_path / "two") == one(zoo, tmp_path)


def test_a_host_that_falls_silent_is_noticed(zoo, tmp_path):
    """A cable that is pulled closes no connection: without signs of life the other host would wait for ever."""
    with two_hosts() as names:
        both = on_hosts(names, command(zoo, tmp_path, tmp_path / "two"))
        for line in both[0].stderr:
            if "output" in line:
                break
        pull(names[1])
        codes, told = ends(both, 200)
    assert codes == [75, 75] and not (tmp_path / "two").exists(), told
