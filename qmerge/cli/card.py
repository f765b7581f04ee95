"""`qmerge card`: give a written checkpoint its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmerge.cli.completing import PLACE
from qmerge.cli.options import json_option
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.errors import Refused, UsageProblem

if TYPE_CHECKING:
    from qmerge.report.card import Origin

CARD = "README.md"
CONFIGS = {"base": "config.json", "adapter": "adapter_config.json"}


@click.command("card", cls=QuietCommand, short_help="Write the model card of a checkpoint.", example="qmerge card OUT --base BASE --id ORG/NAME")
@click.argument("out", type=PLACE, metavar="OUT")
@click.option("--results", type=PLACE, metavar="results.json", help="What was measured (default: OUT.eval/results.json where it is there).")
@click.option("--base", type=PLACE, metavar="PATH", help="The base it was made from, a folder or a hub id: for its licence and its id.")
@click.option("--adapter", "adapters", type=PLACE, metavar="PATH", multiple=True, help="The adapter it was made from; several in the order of the merge.")
@click.option("--base-id", metavar="ORG/NAME", help="The base's id on the hub, where it was merged from a local copy.")
@click.option("--adapter-id", "adapter_ids", metavar="ORG/NAME", multiple=True, help="The same for the adapter; several in the order of the merge.")
@click.option("--id", "model_id", metavar="ORG/NAME", help="What this checkpoint will be called on the hub, for the loading commands.")
@click.option("--print", "only_print", is_flag=True, help="Print the card; write nothing.")
@json_option("card (the text), written (the path; null with --print)")
def card_command(
    out: str, results: str | None, base: str | None, adapters: tuple[str, ...], base_id: str | None, adapter_ids: tuple[str, ...], model_id: str | None, only_print: bool, as_json: bool
) -> None:
    """Write OUT/README.md: both base models, what merging cost, how to load it, the base's licence. The manifest is renewed with it."""
    from qmerge.report.card import Facts, render_card
    from qmerge.store.jsonfiles import read_object
    from qmerge.store.manifest import MANIFEST, read_manifest
    from qmerge.store.publish import put_aside
    from qmerge.store.renew import add_file

    folder = Path(out)
    if not (folder / MANIFEST).is_file():
        raise Refused("qmerge did not write this folder", where=out, expected=MANIFEST, found="none" if folder.is_dir() else "a file" if folder.exists() else "no such folder", fix=put_aside(folder))
    manifest = read_manifest(folder)
    if not isinstance(manifest.get("inputs"), dict):
        raise Refused("the manifest names no inputs", where=MANIFEST, expected="what it was made from, by role", found=type(manifest.get("inputs")).__name__, fix="the manifest is damaged: merge again; qmerge verify tells more")
    origins = _origins(manifest, base, adapters, base_id, adapter_ids)
    measured, arm = _measured(folder, manifest, results)
    name = folder.resolve().name
    _check_ids(("--id", (model_id,) if model_id else ()))
    text = render_card(Facts(name, read_object(folder / "config.json", what="the config"), manifest, origins[0], origins[1:], model_id, measured, arm))
    if not only_print:
        add_file(folder, CARD, text)
    if as_json:
        result_json({"written": None if only_print else str(folder / CARD), "card": text})
    else:
        result(text.rstrip("\n") if only_print else str(folder / CARD))
    if not all(origin.hub_id for origin in origins):
        warn("an input has no id on the hub, so base_model is incomplete: --base-id ORG/NAME, --adapter-id ORG/NAME")
    if not origins[0].licence:
        warn("no licence is known of the base, so the card names none: --base P reads it from the base's own card")
    if only_print:
        return
    say(f"Next: qmerge verify {out}, or qmerge push {out} --repo {model_id or 'ORG/NAME'}")


def _check_ids(*given: tuple[str, tuple[str, ...]]) -> None:
    from qmerge.report.card import HUB_ID

    for flag, values in given:
        for value in values:
            if not HUB_ID.fullmatch(value):
                raise UsageProblem("this is no id of the hub", where=flag, expected="ORG/NAME", found=value, fix="write it as it stands in the address of the model: https://huggingface.co/ORG/NAME")


def _origins(manifest: dict[str, Any], base: str | None, adapters: tuple[str, ...], base_id: str | None, adapter_ids: tuple[str, ...]) -> list[Origin]:
    """Base first, then the adapters in the order of the merge."""
    _check_ids(("--base-id", (base_id,) if base_id else ()), ("--adapter-id", adapter_ids))
    roles = ["base", *(role for role in manifest["inputs"] if role.startswith("adapter"))]
    for flag, given in (("--adapter", adapters), ("--adapter-id", adapter_ids)):
        if given and len(given) != len(roles) - 1:
            raise UsageProblem("the checkpoint was made of another number of adapters", where=flag, expected=len(roles) - 1, found=len(given), fix="give as many as the merge had, in its order: manifest.json names them")
    places, ids = [base, *(adapters or [None] * len(roles))], [base_id, *(adapter_ids or [None] * len(roles))]
    return [_origin(manifest["inputs"].get(role) or {}, role, place, hub_id) for role, place, hub_id in zip(roles, places, ids, strict=False)]


def _origin(row: dict[str, Any], role: str, place: str | None, hub_id: str | None) -> Origin:
    """One input by its row in the manifest, with the id and the licence that ``place`` adds. Refused where ``place`` is another model."""
    from qmerge.report.card import HUB_ID, Origin, licence_of
    from qmerge.store.hub import resolve
    from qmerge.store.jsonfiles import read_object
    from qmerge.store.manifest import digest_file

    name, revision = str(row.get("name") or role), row.get("revision")
    known = hub_id or (name if HUB_ID.fullmatch(name) else None)
    if place is None:
        return Origin(name, known, revision)
    folder, found_name, _ = resolve(place, also=(CARD,))
    config = folder / CONFIGS["adapter" if role.startswith("adapter") else "base"]
    recorded = (row.get("files") or {}).get(config.name, {}).get("sha256")
    if recorded and (not config.is_file() or digest_file(config)["sha256"] != recorded):
        raise Refused(f"this is not the {role} that the checkpoint was made from", where=found_name, expected=f"{config.name} with the SHA-256 in the manifest", found="another, or none", fix="give the input that manifest.json names, or leave the option out: the card then goes by the manifest alone")
    card = folder / CARD
    text = _beginning(card) if card.is_file() else ""
    licence = licence_of(text, read_object(config, what="the config") if config.is_file() else {})
    return Origin(name, known or (found_name if HUB_ID.fullmatch(found_name) else None), revision, licence)


def _beginning(card: Path) -> str:
    from qmerge.store.regular import open_plain

    with open_plain(card) as file:
        return file.read(200_000).decode("utf-8", "replace")


def _measured(folder: Path, manifest: dict[str, Any], path: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """The results and this checkpoint's arm in them. Refused where they are of another checkpoint: another size, or no candidate of this name."""
    from qmerge.report import fields
    from qmerge.report.load import load_results

    beside = folder.resolve().parent / f"{folder.resolve().name}.eval" / "results.json"
    if path is None and not beside.is_file():
        return None, None
    results = load_results(path or beside)
    names = [name for name in fields.candidate_names(results) if name not in fields.FOR_COMPARISON]
    arm = next((name for name in names if Path(str(fields.one_arm(results, name).get("path"))).name == folder.resolve().name), names[0] if len(names) == 1 else None)
    size = sum(row["bytes"] for name, row in manifest["files"].items() if name.endswith(".safetensors"))
    if arm is None or fields.number(fields.one_arm(results, arm).get("bytes")) != size:
        raise Refused("these results are of another checkpoint", where=path or beside.name, expected=f"a candidate of {size} bytes", found=arm or "no candidate of this name", fix="measure this one: qmerge eval")
    return results, arm
