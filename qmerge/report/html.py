"""How do results become one HTML file that needs no network, no script and no other file?"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from qmerge.report import extra_plots, fields, plots, svg, tables
from qmerge.report.advice import recommend
from qmerge.report.choice import choose, compared
from qmerge.report.clean import clean
from qmerge.report.fields import Results
from qmerge.report.markdown import HOW_ARMS, HOW_LINEARS, fingerprint_digest, floor_sentence, reproduction_steps, verdict_sentence
from qmerge.report.sections import sections
from qmerge.units import format_seconds

WORDS = {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive", None: "No verdict"}
SIGNS = {"pass": "✓", "fail": "✕", "inconclusive": "?"}
MAX_TEXTS = 8


def _asset(name: str) -> str:
    return files("qmerge.report").joinpath(name).read_text("utf-8")


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(_asset("report.html"))


def _figures(results: Results, texts: list[str]) -> list[dict[str, Any]]:
    """The plots that have data, each with its caption. Their text is escaped where it is drawn, in ``svg.text``."""
    captions = plots.captions()
    drawn = [(captions["kl"], plots.kl_distribution(results, text, style=False)) for text in texts]
    drawn += [(captions["windows"], plots.window_nll(results, text, style=False)) for text in texts]
    drawn.append((captions["survival"], plots.delta_survival(results, style=False)))
    if texts:
        drawn.append((captions["size"], plots.size_against_kl(results, texts[0], style=False)))
    drawn.append((captions["tasks"], extra_plots.task_forest(results, style=False)))
    drawn.append((captions["speed"], extra_plots.decode_speed(results, style=False)))
    return [{"caption": caption, "svg": Markup(image)} for caption, image in drawn if image]


def _texts(results: Results, names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": clean(name),
            "rows": tables.summary_rows(results, name, parts=True),
            "notes": tables.notes(results, name),
            "floor": floor_sentence(results, name),
        }
        for name in names
    ]


def render_html(results: Results) -> str:
    """report.html. Every string of the results passes the template's autoescaping; only the style sheets and the plots are trusted."""
    names = fields.text_names(results)[:MAX_TEXTS]
    state, sentence = fields.verdict_state(results), verdict_sentence(results)
    elapsed = fields.number(results.get("elapsed_s"))
    worst = [(clean(name), tables.linear_rows(results, name)) for name in fields.candidate_names(results)[: plots.MAX_CANDIDATES]]
    return _template().render(
        css=Markup(_asset("report.css") + svg.style_sheet()),
        state=state or "none",
        word=WORDS[state],
        signs=SIGNS,
        sentence=sentence[:1].upper() + sentence[1:] if state == "pass" else sentence,
        more=[clean(reason, 400) for reason in fields.other_reasons(results)[:20]],
        advice=recommend(results),
        texts=_texts(results, names),
        checks=tables.check_rows(results, parts=True),
        skipped=tables.skipped(results),
        how_arms=HOW_ARMS,
        how_linears=HOW_LINEARS,
        sections=sections(results),
        choice=choose(results),
        compared=compared(results),
        figures=_figures(results, names),
        worst=[(name, rows) for name, rows in worst if rows],
        fingerprint=tables.fingerprint_rows(results),
        digest=fingerprint_digest(results),
        elapsed=format_seconds(elapsed) if elapsed is not None else None,
        steps=reproduction_steps(results),
    )
