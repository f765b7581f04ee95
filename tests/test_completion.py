"""Does a shell learn from `qmerge completion`, and does it offer what can come next?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmerge.cli.completing import SHELLS, VARIABLE


def offered(*words: str) -> list[str]:
    """What the command answers to bash's function, as ``type,value`` lines."""
    asked = os.environ | {VARIABLE: "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; from qmerge.cli.main import main\ntry:\n main()\nexcept SystemExit:\n assert 'torch' not in sys.modules\n"
    return subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("words, wanted", [
    (("qmerge", "insp"), "plain,inspect"), (("qmerge", "merge", "--form"), "plain,--format"), (("qmerge", "merge", "--format", "comp"), "plain,compressed-tensors"),
    (("qmerge", "run", "--polish", "dis"), "plain,distill"), (("qmerge", "recipe", "ch"), "plain,check"), (("qmerge", "verify", "ou"), "file,ou"),
    (("qmerge", "compare", "r.json", "--budget", "str"), "plain,strict"), (("qmerge", "compare", "r.json", "--budget", "my"), "file,my"),
])  # fmt: skip
def test_what_comes_next_is_offered(words: tuple[str, ...], wanted: str) -> None:
    """Completion that waits for torch, or offers nothing where a value or a file belongs."""
    assert wanted in offered(*words)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_all_that_is_on_stdout(cli: Any, shell: str) -> None:
    """`eval "$(qmerge completion bash)"` would run the talk."""
    found = cli("completion", shell)
    assert found.code == 0 and VARIABLE in found.out and "Next" not in found.out
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=found.out, text=True, capture_output=True).returncode == 0


def test_bash_completes(cli: Any, tmp_path: Path) -> None:
    """A script that bash takes, and that then offers nothing."""
    (tmp_path / "qmerge").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qmerge "$@"\n')
    (tmp_path / "qmerge").chmod(0o755)
    script = cli("completion", "bash").out + '\nCOMP_WORDS=(qmerge merge --cal); COMP_CWORD=2; _qmerge_completion qmerge; echo "${COMPREPLY[@]}"\n'
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))}
    found = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["--calibration"]


def test_help_is_quick() -> None:
    """Seconds of imports before the first line of `qmerge --help`: counted in modules, as time depends on the machine's load."""
    code = "import sys; from qmerge.cli.main import main; sys.argv = ['qmerge', '--help']\ntry:\n main()\nexcept SystemExit:\n print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert not {"torch", "transformers", "numpy", "yaml", "jinja2", "safetensors", "huggingface_hub", "scipy"} & set(loaded)
