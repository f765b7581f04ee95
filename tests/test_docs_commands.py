"""Does every command that README, CONTRIBUTING and docs show run on the demo, but those that carry a mark why not?

A page is one session in a folder of its own, where the names that pages use (BASE, ADAPTER, train.jsonl, OUT, …) are there: ``STAND_INS``.
By default what takes long (merges with calibration, measuring, model loading) is parsed by its own command and a finished merge put in its place, so that what comes after it
on the page can run; with ``-m slow`` every command is carried out. ``-s`` shows the count.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from support.documented import CODE, MARK, PAGES, ROOT, Block, blocks, fences, label, program, table

from qmerge.cli.main import cli as group

DEMO = ROOT / "examples/demo"
STAND_INS = {
    "BASE": "BASE", "ADAPTER": "ADAPTER", "train.jsonl": "train.jsonl", "held-out.jsonl": "held-out.jsonl", "examples": "examples", "eval": "eval",
    "OUT": "OUT", "OUT.eval": "OUT.eval", "out/mine": "OUT", "out/mine.eval": "OUT.eval", "out/tuned": "OUT",
    "results.json": "OUT.eval/results.json", "old/results.json": "OUT.eval/results.json", "accepted/results.json": "OUT.eval/results.json",
    "ADAPTER-A": "ADAPTER", "ADAPTER-B": "ADAPTER", "ADAPTERS#mine": "ADAPTER",
    "MODEL": "MODEL", "outputs/qlora-out": "ADAPTER", "saves/qwen3-4b/lora/sft": "ADAPTER", "OUTPUT_DIR": "ADAPTER", "config.yml": "config.yml", "train_qlora.yaml": "train_qlora.yaml",
    "runs": "OUT.eval", "DIR": "OUT.eval",
}  # fmt: skip
"""a name on a page -> what of the desk lies there"""
QUESTIONS = {
    "choices.jsonl": {"question": "Which is a number?", "options": ["seven", "green"], "answer": 0},
    "twins.jsonl": {"starts": ["The file is", "The green is"], "end": "opened.", "answer": 0},
    "sums.jsonl": {"question": "One and one?", "solution": "They are #### 2"},
}
"""what eval/suites/in-domain.yaml asks the reader to put beside it"""
TRAINING = {
    "config.yml": {"base_model": "MODEL", "adapter": "qlora", "load_in_4bit": True, "bf16": "auto"},
    "train_qlora.yaml": {"model_name_or_path": "MODEL", "finetuning_type": "lora", "quantization_bit": 4, "bf16": True},
}
"""what Axolotl and LLaMA-Factory are started with"""
FLOAT = ("bf16", "fp16", "fp32")
LONG = ("run", "merge", "eval", "bench")
QUICK_PROGRAMS = ("head", "cat", "ls", "mkdir", "cd", "cp", "jq")
LONG_CODE = re.compile(r"from_pretrained\(|\bmerge\(|\bevaluate\(")
SHELL_SIGNS = re.compile(r"[|<>;&`]|\$\(")
SHOWN = [page for page in PAGES if any(block.reason is None for block in blocks(page))]


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Any]) -> Path:
    """Inputs of the demo and one merge of them with its evidence, made once for all worker processes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    place = root / "documented"
    with open(root / "documented.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "OUT.eval/report.html").exists():
            shutil.rmtree(place, ignore_errors=True)
            _prepare(place, cli)
    return place


def _prepare(place: Path, cli: Callable[..., Any]) -> None:
    for name in ("base-nf4", "adapter"):
        shutil.copytree(DEMO / name, place / name.split("-")[0].upper())
    shutil.copytree(DEMO, place / "examples/demo")
    shutil.copytree(ROOT / "eval", place / "eval")
    for name, source, rows in (("train.jsonl", "calibration.jsonl", 24), ("held-out.jsonl", "eval-prose.jsonl", 8)):
        (place / name).write_text("".join((DEMO / source).read_text("utf-8").splitlines(keepends=True)[:rows]), "utf-8")
    for name, row in QUESTIONS.items():
        (place / "eval/suites" / name).write_text("".join(json.dumps(row | {"document": f"page-{number}"}) + "\n" for number in range(4)), "utf-8")
    inputs = ("--base", place / "BASE", "--adapter", place / "ADAPTER")
    for name, settings in TRAINING.items():
        (place / name).write_text(yaml.safe_dump(settings), "utf-8")
    for words in (
        ("merge", "--base", place / "BASE", "--adapter", f"{place / 'ADAPTER'}=0", "--out", place / "MODEL", "--format", "bf16"),
        ("merge", *inputs, "--out", place / "OUT", "--calibration", place / "train.jsonl", "--tokens", 64, "--samples", 8),
        ("eval", *inputs, "--candidate", place / "OUT", "--text", place / "held-out.jsonl", "--out", place / "OUT.eval/results.json"),
        ("report", place / "OUT.eval/results.json", "--out", place / "OUT.eval"),
    ):
        answer = cli(*words)
        assert answer.code == 0, answer.err


class Session:
    """The commands of one page, one after the other, in ``folder``.

    ``quick``: a finished merge takes the place of what takes long, and behind another program that was left out qmerge's commands are only parsed.
    """

    def __init__(self, folder: Path, desk: Path, cli: Callable[..., Any], quick: bool, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.desk, self.cli, self.quick, self.patch = folder, desk, cli, quick, patch
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.long_code, self.left_out, self.given, self.done = False, False, set(), 0
        patch.chdir(folder)

    def lay(self, text: str) -> None:
        """Put what the page names where it names it."""
        for name, source in STAND_INS.items():
            if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", text):
                self._put(source, name)
                if name.endswith("results.json"):  # never without its per-token numbers
                    self._put(source.replace(".json", ".npz"), name.replace(".json", ".npz"))
                self.given.add(name)

    def _put(self, source: str, name: str) -> None:
        target = self.folder / name.replace("#", "/")  # a folder of adapters and the name of one
        target.parent.mkdir(parents=True, exist_ok=True)
        if (self.desk / source).is_dir():
            shutil.copytree(self.desk / source, target, dirs_exist_ok=True)
        else:
            shutil.copy(self.desk / source, target)

    def run(self, block: Block) -> None:
        for command in block.commands:
            if block.language in CODE:
                self._code(command, block)
            elif program(command) == "qmerge" and not SHELL_SIGNS.search(command):
                self._qmerge(command, block)
            else:
                self._shell(command, block)

    def _qmerge(self, command: str, block: Block) -> None:
        words = shlex.split(command)
        at = words.index("qmerge")
        for setting in words[:at]:
            self.patch.setenv(*setting.split("=", 1))
        verb, rest = words[at + 1], words[at + 2 :]
        found = group.get_command(click.Context(group), verb)
        if found is not None and not {"--help", "-h"} & set(rest):
            asked = self._parsed(found, verb, rest, f"{block.where}: {command}")
            self._make_room(verb, asked)
            if self.quick and verb in LONG and not asked.get("dry_run") and not (verb == "merge" and asked["format"] in FLOAT):
                return self._stand_in(verb, asked)
            if self.left_out:
                return
        self.done += 1
        answer = self.cli(*words[at + 1 :])
        fine = (0, 3) if verb == "compare" and (self.quick or "--strict" in rest) else (0,)
        assert answer.code in fine, f"{block.where}: {command}\nexit code {answer.code}\n{answer.err}"

    def _parsed(self, found: click.Command, verb: str, rest: list[str], told: str) -> dict[str, Any]:
        try:
            return found.make_context(verb, list(rest)).params
        except click.ClickException as problem:
            pytest.fail(f"{told}\n{problem.format_message()}")

    def _make_room(self, verb: str, asked: dict[str, Any]) -> None:
        """A stand-in gives way to the page's own merge."""
        if verb in ("run", "merge") and asked["out"] in self.given and not asked["dry_run"]:
            for name in (asked["out"], f"{asked['out']}.eval"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                self.given.discard(name)

    def _stand_in(self, verb: str, asked: dict[str, Any]) -> None:
        if verb in ("run", "merge"):
            self._put("OUT", asked["out"])
        if verb == "run":
            self._put("OUT.eval", f"{asked['out']}.eval")
        if verb == "eval":
            for ending in (".json", ".npz"):
                self._put(f"OUT.eval/results{ending}", str(Path(asked["out"]).with_suffix(ending)))

    def _shell(self, command: str, block: Block) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{self._shim()}{os.pathsep}{os.environ['PATH']}"
        assert shutil.which(program(command), path=path), f"{block.where}: there is no {program(command)} here: install it, or mark the block"
        if self.quick and program(command) not in QUICK_PROGRAMS:
            self.left_out = True  # what comes after may want what it makes
            return
        self.done += 1
        env = os.environ | {"PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block.where}: {command}\nexit code {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}"

    def _shim(self) -> Path:
        """Where ``qmerge`` is this working tree's."""
        shim = self.folder / ".bin/qmerge"
        if not shim.exists():
            shim.parent.mkdir(exist_ok=True)
            shim.write_text(f"#!{sys.executable}\nfrom qmerge.cli.main import main\nmain()\n")
            shim.chmod(0o755)
        return shim.parent

    def _code(self, source: str, block: Block) -> None:
        made = compile(source, block.where, "exec")
        self.long_code |= bool(LONG_CODE.search(source))
        if self.quick and self.long_code:
            return
        self.done += 1
        with contextlib.redirect_stdout(io.StringIO()):
            exec(made, self.names)


def _play(page: Path, folder: Path, desk: Path, cli: Callable[..., Any], quick: bool) -> None:
    wanted = [block for block in blocks(page) if block.reason is None]
    with pytest.MonkeyPatch.context() as patch:
        session = Session(folder, desk, cli, quick, patch)
        session.lay("\n".join(block.body for block in wanted))
        for block in wanted:
            session.run(block)
    print(f"\n{label(page)}: {session.done} of {sum(len(block.commands) for block in wanted)} commands carried out")


@pytest.mark.parametrize("page", SHOWN, ids=label)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, desk: Path, cli: Callable[..., Any]) -> None:
    """Catches a page whose commands were renamed, take other options, or need what the page never made."""
    _play(page, tmp_path, desk, cli, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", SHOWN, ids=label)
def test_the_commands_of_a_page_run_in_full(page: Path, tmp_path: Path, desk: Path, cli: Callable[..., Any]) -> None:
    """Catches a merge, a measurement or a loader of the docs that fails where the quick test put a finished one."""
    _play(page, tmp_path, desk, cli, quick=False)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_marks_are_read_and_say_why(page: Path) -> None:
    """Catches a mark that stands where no block follows, so that nobody reads it, and one that gives no reason."""
    above = {block.number - 2 for block in blocks(page)}
    marks = {row: found for row, line in enumerate(page.read_text("utf-8").splitlines()) if (found := MARK.search(line))}
    assert not set(marks) - above
    assert all(len(block.reason.split()) >= 3 for block in blocks(page) if block.reason)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_stand_in_blocks_of_their_language(page: Path) -> None:
    """Catches commands in a fence without a language, which nothing would run."""
    plain = [block for block in fences(page) if block.language in ("", "text")]
    assert not [block.where for block in plain for line in block.body.splitlines() if re.match(r"(\$ |[A-Z_]+=\S+ |)(qmerge (?!.*\[OPTIONS\])|make |pip |python )", line)]


def test_the_count_is_known() -> None:
    """Catches a reader of blocks that finds none, in which case everything here would pass."""
    print(f"\n{table()}")
    assert len(SHOWN) > 5 and sum(len(block.commands) for page in SHOWN for block in blocks(page) if block.reason is None) > 40


@pytest.mark.parametrize(
    "block, told",
    [
        ("```sh\nqmerge merge --bas BASE --adapter ADAPTER --out OUT --rtn\n```", "--bas"),
        ("```sh\nqmerge run --base BASE --adapter ADAPTER --out OUT-new --calibration train.jsonl\nqmerge verify OUT-old\n```", "page.md:1: qmerge verify OUT-old"),
        ("```sh\nno-such-engine serve OUT\n```", "no no-such-engine here"),
        ("```python\nimport qmerge\n\nqmerge.no_such_name\n```", "no_such_name"),
    ],
    ids=["option", "nothing there", "program", "name"],
)
def test_a_page_that_is_wrong_fails(block: str, told: str, tmp_path: Path, desk: Path, cli: Callable[..., Any]) -> None:
    """Catches a session that carries nothing out, so that every page passes it."""
    page, folder = tmp_path / "page.md", tmp_path / "folder"
    page.write_text(block)
    folder.mkdir()
    with pytest.raises((pytest.fail.Exception, AssertionError, AttributeError), match=re.escape(told)):
        _play(page, folder, desk, cli, quick=True)
    page.write_text(f"<!-- not run: an example of a wrong one -->\n{block}")
    _play(page, folder, desk, cli, quick=True)
