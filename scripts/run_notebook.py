"""Run eval/python_api.ipynb on the demo and keep its outputs in the file, without what tells of the machine that it ran on.

    python scripts/run_notebook.py [--check]

``--check``: run it and leave the file as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from qmerge.errors import QmergeError
from qmerge.extras import need

NOTEBOOK = Path(__file__).parents[1] / "eval" / "python_api.ipynb"
LIMIT_S = 1800
"""for a cell, on a busy machine"""


def run(notebook: Path) -> Any:
    """The notebook with the outputs of a fresh run. What libraries said on stderr goes to this one's, and not into the file. Raises where a cell does."""
    need("running the notebook", "nbformat", "nbclient", "ipykernel")
    import nbformat
    from nbclient import NotebookClient

    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    book = nbformat.read(notebook, as_version=4)
    NotebookClient(book, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}}, record_timing=False).execute()
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                print(f"cell {cell.id}: {output.text}", file=sys.stderr)
            elif "image/svg+xml" in output.get("data", {}):
                output.data.pop("text/plain", None)
        cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.name != "stderr"]
    book.metadata = {"kernelspec": book.metadata.kernelspec, "language_info": {"name": "python"}}
    return book


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check, began = parser.parse_args().check, time.perf_counter()
    try:
        book = run(NOTEBOOK)
    except QmergeError as problem:
        sys.exit(f"error: {problem}")
    if not check:
        import nbformat

        nbformat.write(book, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {'runs' if check else 'written'}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
