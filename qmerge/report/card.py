"""What does the model card of a written checkpoint say: where it comes from, what merging cost, how to load it?

Only what the manifest, the config, the results and the inputs' own cards hold. What is not known (a hub id, a licence) is left out, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from qmerge.report import fields, tables
from qmerge.report.clean import clean
from qmerge.report.clean import markdown_text as md
from qmerge.report.engines import FLOAT, format_name, snippets
from qmerge.report.fields import Results
from qmerge.report.markdown import table, verdict_sentence
from qmerge.report.sections import sections, text_of
from qmerge.store.yamlfiles import BadYaml, parse_yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
PLAIN_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
ADDRESS = re.compile(r"(?:https://)?[\w./%#?=&+-]{1,300}", re.ASCII)
LICENCE_KEYS = ("license", "license_name", "license_link")
MAX_TEXTS = 6


@dataclass(frozen=True)
class Origin:
    """One input. ``name`` as people call it; ``hub_id`` where known; ``licence`` as its own card says it (``license``, ``license_name``, ``license_link``)."""

    name: str
    hub_id: str | None = None
    revision: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What a card is made of. ``config`` and ``manifest`` are the checkpoint's; ``arm`` is its name in ``results``."""

    name: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    base: Origin
    adapters: Sequence[Origin]
    model_id: str | None = None
    results: Results | None = None
    arm: str | None = None


def licence_of(card: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The licence that a model's own card (its text) or config states; ``{}`` where neither does or what they say is not one."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card[:200_000], re.DOTALL)
    try:
        front = parse_yaml(found[1]) if found else None
    except BadYaml:
        front = None
    stated = fields.as_dict(front) if fields.as_dict(front).get("license") else fields.as_dict(config)
    name = stated.get("license")
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if not isinstance(name, str) or not LICENCE.fullmatch(name.lower()):
        return {}
    rest = {"license_name": LICENCE.pattern, "license_link": ADDRESS.pattern}
    return {"license": name.lower()} | {key: value for key, pattern in rest.items() if isinstance(value := stated.get(key), str) and re.fullmatch(pattern, value, re.ASCII)}


def front_matter(facts: Facts) -> str:
    """The card's YAML. ``base_model_relation`` is one of the hub's own: ``merge`` of base and adapters, ``finetune`` where only one of them has an id."""
    kind = _kind(facts)
    ids = list(dict.fromkeys(origin.hub_id for origin in (facts.base, *facts.adapters) if origin.hub_id))
    asked = fields.as_dict(facts.manifest.get("recipe")).get("bits", 4)  # compressed-tensors' config says it group by group
    bits = fields.as_dict(facts.config.get("quantization_config")).get("bits", asked)
    tags = ["qmerge", "qlora", "merge", *([format_name(kind)] if kind not in FLOAT else []), *([f"{bits}-bit"] if kind not in FLOAT and isinstance(bits, int) else [])]
    data: dict[str, Any] = {}
    if ids:
        data |= {"base_model": ids, "base_model_relation": "merge" if len(ids) > 1 else "finetune"}
    data |= {"library_name": "transformers"}
    if any(str(name).endswith("ForCausalLM") for name in fields.as_list(facts.config.get("architectures"))):
        data["pipeline_tag"] = "text-generation"
    data |= {key: facts.base.licence[key] for key in LICENCE_KEYS if key in facts.base.licence}
    return f"---\n{yaml.safe_dump(data | {'tags': tags}, sort_keys=False, allow_unicode=False)}---"


def _kind(facts: Facts) -> str:
    settings = fields.as_dict(facts.config.get("quantization_config"))
    method = str(settings.get("quant_method") or "none")
    return str(settings.get("bnb_4bit_quant_type", "nf4")) if method == "bitsandbytes" else method


def render_card(facts: Facts) -> str:
    """README.md for the checkpoint."""
    kind = _kind(facts)
    adapters = " and ".join(f"the adapter *{md(origin.hub_id or origin.name)}*" for origin in facts.adapters) or "a LoRA adapter"
    place = facts.model_id or (facts.name if PLAIN_NAME.fullmatch(facts.name) else "MODEL")  # it goes into commands and code
    form = f"requantized to {md(format_name(kind))}" if kind not in FLOAT else "as float weights"
    parts = [
        front_matter(facts),
        f"# {md(facts.name)}",
        f"The base *{md(facts.base.hub_id or facts.base.name)}* with {adapters} merged into its dequantized weights, {form}, by qmerge {md(fields.as_dict(facts.manifest.get('tool')).get('version', ''))}. "
        "It needs neither PEFT nor qmerge to run.",
        "## Loading",
        *(f"{engine}:\n\n```{language}\n{code.replace('MODEL', place)}\n```" for engine, language, code in snippets(kind)),
        *_cost(facts),
        *_made(facts),
        *_licence(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _cost(facts: Facts) -> list[str]:
    if facts.results is None or facts.arm is None:
        return ["## What merging cost", "Not measured for this card."]
    results, arm = facts.results, clean(facts.arm)
    parts = ["## What merging cost", "Against *separate*, the base with the adapter kept apart, on the same tokens. Brackets hold 95 % intervals; retention is the share of the adapter's gain that is left."]
    keys, heads = zip(*tables.SUMMARY, strict=True)
    for text in fields.text_names(results)[:MAX_TEXTS]:
        names = {"base": "base", "separate": "separate", arm: "this model"}
        rows = [[names[row["arm"]] if key == "arm" else row[key] for key in keys] for row in tables.summary_rows(results, text) if row["arm"] in names]
        parts += [f"On {md(text)}:", table(heads, rows, right=(1, 2, 3, 4, 5)), *(md(said, 400) for said in tables.more_than_all(results, text, (facts.arm,)))]
    for section in sections(results):
        rows = [[text_of(cell) for cell in row] for row in section.rows if row[0] == arm]
        if rows and section.title in ("Benchmarks", "Greedy continuations against separate", "Perplexity by protocol"):
            parts += [f"{section.title}. {md(section.how, 400)}", table(section.heads[1:], [row[1:] for row in rows], [column - 1 for column in section.right])]
    state = fields.candidate_state(results, facts.arm)
    if state:
        budget = clean(fields.as_dict(results.get("verdict")).get("budget") or "default")
        words = {"pass": "inside", "fail": "outside", "inconclusive": "not known to be inside"}[state]
        parts.append(f"It is {words} the budget {md(budget)}" + (f": {md(verdict_sentence(results), 400)}" if state != "pass" else ".") + " Nothing else was evaluated.")
    return parts


def _made(facts: Facts) -> list[str]:
    recipe = fields.as_dict(facts.manifest.get("recipe"))
    rows = [["base", _origin(facts.base)], *(["adapter", _origin(origin)] for origin in facts.adapters)]
    rows += [[key.replace("_", " "), str(value)] for key in ("merged_on", "format", "bits", "group_size", "symmetric", "combine", "weights", "polish", "seed") if (value := recipe.get(key)) not in (None, [], "")]
    rows += [[name, str(version)] for name, version in fields.as_dict(facts.manifest.get("versions")).items()]
    return ["## How it was made", "`manifest.json` names the digests of all inputs and files; `qmerge verify` checks them.", table(("", ""), rows)]


def _origin(origin: Origin) -> str:
    return clean(origin.hub_id or origin.name) + (f", revision {clean(origin.revision)}" if origin.revision else "")


def _licence(facts: Facts) -> list[str]:
    known = [(role, origin.licence.get("license_name") or origin.licence["license"]) for role, origin in (("base", facts.base), *(("adapter", one) for one in facts.adapters)) if origin.licence]
    files = [name for name in fields.as_dict(facts.manifest.get("files")) if name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY"))]
    said = [f"The {role}'s own card states {md(name)}." for role, name in known] or ["The inputs' cards state no licence that could be carried over; see the base's and the adapter's own pages."]
    return ["## Licence", " ".join(said) + (f" Licence files: {md(', '.join(sorted(files)))}." if files else "")]
