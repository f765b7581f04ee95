"""Run eval/separate_vs_merged.ipynb on a results.json and render it to one HTML file: no script, no network, in the report's own style.

    python scripts/render_notebook.py out/demo.eval/results.json docs/separate_vs_merged.html

nbconvert's own page carries 300 kB of style sheets and asks the network for scripts; its ``basic`` template gives the cells alone. Code cells are
left out: the page is for the colleague who reads it, and the notebook is beside it.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from importlib.resources import files
from pathlib import Path

from qmerge.errors import QmergeError
from qmerge.extras import need

NOTEBOOK = Path(__file__).parents[1] / "eval" / "separate_vs_merged.ipynb"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Keep the adapter separate, or ship a merged checkpoint?</title>
<style>{css}</style>
</head>
<body>
<main>
{cells}
</main>
</body>
</html>
"""
MORE = "main table{display:block;overflow-x:auto}main td:first-child{min-width:7rem}@media (max-width:60rem){main td:not(:first-child),main th{white-space:nowrap}}svg.qmp{display:block;margin:1.2rem 0}.anchor-link{display:none}"


def render(results: Path) -> str:
    """The page, from a run of the notebook on ``results``."""
    need("running the notebook", "nbformat", "nbclient", "nbconvert", "ipykernel")
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    os.environ["QMERGE_RESULTS"] = str(results.resolve())
    book = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    cells, _ = HTMLExporter(template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(book)
    # nbconvert makes pictures of drawings; inline they have their words, and follow the page's colours
    cells = re.sub(r'<img[^>]*src="data:image/svg\+xml;base64,([A-Za-z0-9+/=\s]+)"[^>]*>', lambda found: base64.b64decode(found[1]).decode("utf-8"), cells)
    css = files("qmerge.report").joinpath("report.css").read_text("utf-8")
    return PAGE.format(css=css + MORE, cells=re.sub(r"\n{2,}", "\n", cells).strip())


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: render_notebook.py results.json page.html")
    target = Path(sys.argv[2])
    try:
        page = render(Path(sys.argv[1]))
    except QmergeError as problem:
        sys.exit(f"error: {problem}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, "utf-8")
    print(target)


if __name__ == "__main__":
    main()
