"""Is report.html one inert file, and are its plots well formed, small and the same every time?"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from report_rich import hostile_rich_results, rich_results
from test_report_results import build_results, hostile_results

from qmerge.report import extra_plots, plots
from qmerge.report.html import render_html

PLOTS = {
    "kl": lambda results: plots.kl_distribution(results),
    "survival": lambda results: plots.delta_survival(results),
    "windows": lambda results: plots.window_nll(results),
    "size": lambda results: plots.size_against_kl(results),
    "tasks": lambda results: extra_plots.task_forest(results),
    "speed": lambda results: extra_plots.decode_speed(results),
}
ALLOWED = set(
    "html head meta title style body main header section h1 h2 h3 p strong em span ul ol li div table thead tbody tr th td figure figcaption "
    "details summary svg desc rect text path".split()
)


class _Reader(HTMLParser):
    """Collects elements and attributes, and checks that every element that must be closed is."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _read(page: str) -> list[tuple[str, dict[str, str | None]]]:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader.elements


@pytest.mark.parametrize("build", [build_results, hostile_results])
def test_nothing_active(build) -> None:
    """Catches an element or attribute that a name brought along: the set of elements is fixed, and none of them can act or load."""
    page = render_html(build())
    elements = _read(page)
    assert {tag for tag, _ in elements} <= ALLOWED
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "action", "srcdoc")], (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert "\x1b" not in page and "\u202e" not in page
    page.encode("utf-8")


def test_hostile_names_add_no_element() -> None:
    """Catches one unescaped name anywhere: the hostile page has exactly the elements of the plain one."""
    plain, hostile = ([tag for tag, _ in _read(render_html(build())) if tag not in ("path", "text")] for build in (build_results, hostile_results))
    assert plain == hostile


def test_policy_forbids_scripts_and_network() -> None:
    """Catches a page that could load or run something if escaping ever failed."""
    policies = [row for tag, row in _read(render_html(build_results())) if tag == "meta" and row.get("http-equiv") == "Content-Security-Policy"]
    assert [row["content"] for row in policies] == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"]
    assert "@import" not in render_html(build_results()) and "url(" not in render_html(build_results())


def test_order_of_the_page() -> None:
    """Catches the answer being put below its evidence."""
    page = render_html(build_results())
    words = ("Fail</h1>", "Ship nf4.", "<h2>Arms", "<h2>Gate", "<h2>Benchmarks", "<h2>Plots", "<h2>Linears", "<h2>Fingerprint", "<h2>How to reproduce", "<h2>Separate or merged?")
    places = [page.index(word) for word in words]
    assert places == sorted(places)
    assert page.count("<figure>") == 7


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("build", [rich_results, hostile_rich_results])
def test_plot_is_well_formed_and_small(name: str, build) -> None:
    """Catches SVG that a notebook cannot parse, coordinates that are not numbers, and chance in the drawing."""
    image = PLOTS[name](build())
    assert image
    root = ElementTree.fromstring(image)
    assert root.tag.endswith("svg") and root.get("viewBox")
    assert len(image.encode()) < 150_000
    assert image == PLOTS[name](build())
    assert not {"nan", "inf"} & set(image.replace("M", " ").replace("L", " ").replace('"', " ").split())


@pytest.mark.parametrize("name", PLOTS)
def test_nothing_to_draw_is_an_empty_string(name: str) -> None:
    """Catches empty axes in the report."""
    assert PLOTS[name]({}) == ""


def test_large_models_stay_small() -> None:
    """Catches a plot that grows with a mixture-of-experts model's tens of thousands of linears, or with long texts."""
    results = build_results()
    for name in ("nf4", "naive"):
        results["arms"][name]["linears"] = {
            f"model.layers.{layer}.mlp.experts.{expert}.up_proj": {"delta_survival": 0.9 + 0.001 * (expert % 50)} for layer in range(48) for expert in range(200)
        }
        cell = results["arms"][name]["texts"]["gsm8k-test"]
        cell["window_nll_delta"] = cell["window_nll_delta"] * 500
    assert len(plots.delta_survival(results)) < 150_000
    assert len(plots.window_nll(results)) < 150_000


@pytest.mark.parametrize("values", [[0.0] * 101, [0.0] * 100 + [1e-30], [-1e-9] * 101, [5.0] * 101, [1e-12 * 10 ** (index / 8) for index in range(101)]])
def test_degenerate_distributions_draw(values: list[float]) -> None:
    """Catches a logarithm of zero, an axis of no length, and dozens of decades."""
    results = build_results()
    for arm in ("base", "merged", "nf4", "naive"):
        cell = results["arms"][arm]["texts"]["gsm8k-test"]
        cell["kl_quantiles"], cell["window_nll_delta"] = values, values
        cell["metrics"]["kl_mean"]["value"] = max(values)
        results["arms"][arm]["bytes"] = 0 if arm == "nf4" else 5
    for draw in PLOTS.values():
        image = draw(results)
        assert not image or ElementTree.fromstring(image) is not None


def test_layer_is_the_first_number() -> None:
    """Catches experts counted as layers."""
    assert plots.layer_of("model.layers.3.mlp.experts.17.up_proj") == 3
    assert plots.layer_of("transformer.h.11.attn.c_attn") == 11
    assert plots.layer_of("lm_head") is None
