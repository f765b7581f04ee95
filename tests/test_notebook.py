"""Does the committed notebook run on results as they are written, and is it committed clean?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_rich import rich_results
from test_report_results import build_results

NOTEBOOK = Path(__file__).parents[1] / "eval" / "separate_vs_merged.ipynb"


def test_notebook_is_committed_without_outputs() -> None:
    """Catches numbers of somebody's run in the repository, and an invalid file."""
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5) and len(book.cells) <= 8
    assert book.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")


@pytest.mark.parametrize("hand_over", ["environment", "default"])
def test_notebook_runs(hand_over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a notebook that broke when the report's functions changed, and one that finds results only on its author's machine."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    place = tmp_path / ("elsewhere" if hand_over == "environment" else "out/demo.eval")
    place.mkdir(parents=True)
    (tmp_path / "eval").mkdir()
    (place / "results.json").write_text(json.dumps(rich_results() if hand_over == "environment" else build_results()), "utf-8")
    monkeypatch.delenv("QMERGE_RESULTS", raising=False)
    if hand_over == "environment":
        monkeypatch.setenv("QMERGE_RESULTS", str(place / "results.json"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "eval")}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    assert sum("image/svg+xml" in output.data for output in outputs) == (8 if hand_over == "environment" else 7)
    shown = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.data]
    assert "| nf4 |" in shown[0] and "## Separate or merged?" in shown[-1] and len(shown) == 2


def test_notebook_cells_survive_missing_parts() -> None:
    """Catches a cell that fails where a plot has no data: the calls that it makes answer with no image."""
    from qmerge.report.extra_plots import decode_speed, task_forest
    from qmerge.report.markdown import choice_markdown
    from qmerge.report.plots import delta_survival, kl_distribution, per_text, size_against_kl, window_nll

    assert per_text({}, kl_distribution) == per_text({}, window_nll) == []
    assert delta_survival({}) == size_against_kl({}) == task_forest({}) == decode_speed({}) == ""
    assert "No recommendation" in choice_markdown({})


def test_the_committed_page_is_inert_and_of_this_notebook() -> None:
    """Catches a rendered page that runs or loads something, that is megabytes large, or that lags behind the notebook's own words."""
    page = (NOTEBOOK.parents[1] / "docs" / "separate_vs_merged.html").read_text("utf-8")
    assert len(page) < 400_000 and "<script" not in page and "<link" not in page and "Content-Security-Policy" in page
    assert not [word for word in ("src=", "@import", "url(", "/root/", "/home/") if word in page]
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    headings = [line.strip("# \n") for cell in book["cells"] if cell["cell_type"] == "markdown" for line in cell["source"] if line.startswith("#")]
    assert all(heading in page for heading in headings)
