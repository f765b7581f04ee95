"""Every adapter feature on every architecture and kind of base: the merged model answers as PEFT's separate one, or the merge is refused. docs/support.md is what is held here."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from support.adapters import Blank, Refusal
from support.bench import MOVED, Bench
from support.matrix import MEASURED, REGENERATE, Place, in_every_run, places, render

from qmerge.errors import QmergeError

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
CELLS = [place for place in places() if not isinstance(place.cell, Blank)]
QUICK = in_every_run()
EXACT = [pytest.param(place, id=place.id, marks=() if place.id in QUICK else pytest.mark.slow) for place in CELLS if not isinstance(place.cell, Refusal)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small are slower on several
    yield Bench(tmp_path_factory.mktemp("support"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """Largest difference by group of the page."""
    return {}


@pytest.mark.parametrize("place", EXACT)
def test_merged_answers_as_separate(bench, measured, place: Place):
    """A factor, a scale, a tie, an order of weights or a name on disk that is lost in this feature, architecture and kind of base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bench.run(place.architecture, place.base, place.cell)
    measured[place.group] = max(found.error, measured.get(place.group, 0.0))
    assert found.error < place.cell.tolerance, f"differs by {found.error:.1e} of the largest logit"
    assert found.moved > MOVED, f"the adapter moves the logits by {found.moved:.1e} only"


@pytest.mark.parametrize("place", [place for place in CELLS if isinstance(place.cell, Refusal)], ids=lambda place: place.id)
def test_refused_by_name(bench, place: Place):
    """An adapter that cannot be merged and is merged all the same, or is refused for a reason that helps nobody."""
    with warnings.catch_warnings(), pytest.raises(QmergeError, match=re.escape(place.cell.message)):
        warnings.simplefilter("ignore")
        bench.run(place.architecture, place.base, place.cell.case)


def test_page_says_what_is_tested(request, measured):
    """A page that promises what no test holds. Written anew with ``--write-support``."""
    if request.config.getoption("--write-support"):
        assert len(measured) == len({place.group for place in CELLS if not isinstance(place.cell, Refusal)}), "run the whole file to write the page"
        PAGE.write_text(render(measured), encoding="utf-8")
    held = re.sub(rf"\n{MEASURED}.*\n", "", PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "")
    assert held == render(), f"docs/support.md is stale: {REGENERATE}"
