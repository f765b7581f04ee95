"""Does the notebook of the Python API run as it is committed, and are its outputs those of a whole run that name nobody's machine?"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "eval" / "python_api.ipynb"


@pytest.fixture(scope="module")
def book() -> Any:
    return json.loads(NOTEBOOK.read_text("utf-8"))


def test_it_is_small_and_was_run_from_first_to_last(book) -> None:
    """Catches outputs of cells that were run in another order, or that failed, and megabytes of pictures."""
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)) and all(cell["outputs"] for cell in code)
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 60_000


def test_it_names_no_machine_and_no_place(book) -> None:
    """Catches a path of a home or a temporary folder, the host's or the user's name, and what a library prints."""
    shown = json.dumps([cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code"])
    assert not re.findall(r"/(?:home|root|tmp|Users|work|var)/", shown) and "GPT-QModel" not in shown
    names = {socket.gethostname(), os.environ.get("USER", "")} - {"", "root", "localhost"}
    assert not [name for name in names if len(name) > 3 and name in shown]


def test_its_cells_run(book, zoo, tmp_path, monkeypatch) -> None:
    """Catches a call, an argument or a field that the package no longer has. Here on the tests' tiny model, at the demo's place."""
    pytest.importorskip("IPython")
    demo = tmp_path / "examples/demo"
    (tmp_path / "eval").mkdir()
    demo.mkdir(parents=True)
    for name, place in (("base-nf4", zoo.nf4("llama")), ("adapter", zoo.adapter("llama")), ("calibration.jsonl", zoo.calibration), ("eval-prose.jsonl", zoo.held_out), ("eval-code.jsonl", zoo.other)):
        (demo / name).symlink_to(place)
    monkeypatch.chdir(tmp_path / "eval")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in (cell for cell in book["cells"] if cell["cell_type"] == "code"):
        source = "".join(cell["source"]).replace("tokens=256", "tokens=64").replace("samples=24", "samples=8")
        exec(compile(source, cell["id"], "exec"), names)  # noqa: S102
    assert names["results"].candidates[0].name == "gptq" and names["verdict"].exit_code == 3 and set(names["means"]) == {"base", "rtn", "gptq"}
