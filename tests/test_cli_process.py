"""Does the command as a process show what it should, where it should? In-process runners do not see the streams that it swaps."""

import subprocess
import sys
from pathlib import Path

import pytest


def _run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "qmerge", *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [(), ("run",), ("merge",), ("eval",), ("bench",), ("compare",), ("report",), ("verify",), ("inspect",)])
def test_help_is_shown(words):
    """Keeping the libraries' banners away must not keep the help away."""
    found = _run(*words, "--help")
    assert found.returncode == 0 and "Usage: " in found.stdout and found.stderr == ""


def test_version_is_shown():
    """A wrapper that asks for the version gets an empty line."""
    assert _run("--version").stdout.startswith("qmerge, version 0.")


def test_a_malformed_command_speaks_on_stderr_and_exits_2():
    """Scripts read stdout: a usage message there would be taken for a result."""
    found = _run("merge", "--no-such-option")
    assert found.returncode == 2 and found.stdout == "" and "--no-such-option" in found.stderr


def test_a_refusal_says_what_where_and_what_was_written(tmp_path):
    """The one message that a person acts on must reach the terminal, without a traceback."""
    found = _run("merge", "--base", str(tmp_path), "--adapter", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--rtn")
    assert found.returncode == 4 and found.stdout == "" and "Traceback" not in found.stderr
    assert "what to do:" in found.stderr and "written:    nothing" in found.stderr


def test_help_starts_without_torch():
    """`qmerge --help` must not wait for torch."""
    code = "import sys; from qmerge.cli.main import cli\ntry:\n cli.main(['--help'])\nexcept SystemExit:\n pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("words", [("--also", "foo"), ("--suite", "nope.yaml"), ("--budget", "strickt"), ("--also", "original")])
def test_what_measuring_would_refuse_is_refused_before_the_merge(cli, tmp_path, words):
    """Hours of merging, and then a typo in an option of the evaluation."""
    demo = Path(__file__).parent.parent / "examples" / "demo"
    found = cli("run", "--base", f"{demo}/base-nf4", "--adapter", f"{demo}/adapter", "--out", str(tmp_path / "out"),
                 "--calibration", f"{demo}/calibration.jsonl", "--text", f"{demo}/eval-prose.jsonl", *words)
    assert found.code == 2 and words[1] in found.err + found.out
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_written_over_a_folder(cli, tmp_path):
    """Measuring for an hour and then finding that --out is a folder."""
    found = cli("eval", "--base", "b", "--adapter", "a", "--candidate", "c", "--text", "t.txt", "--out", str(tmp_path))
    assert found.code == 2 and "names a folder" in found.err


def test_verify_refuses_swapped_inputs_and_says_nothing_of_the_checkpoint(cli, zoo, written):
    """A wrong --base path in CI must not condemn a good checkpoint: that is 4, not 1."""
    out, base, adapter = written("llama", "bf16")[0], zoo.nf4("llama"), zoo.adapter("llama")
    found = cli("verify", out, "--base", adapter, "--adapter", base)
    assert found.code == 4 and "do not serve" not in found.err
    assert cli("verify", out, "--base", base, "--adapter", adapter).code == 0
