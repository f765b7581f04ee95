"""`qmerge push`: put a verified checkpoint on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qmerge.api.looking import check_asked
from qmerge.cli.completing import PLACE
from qmerge.cli.options import json_option
from qmerge.cli.output import QuietCommand, result, result_json, say, warn
from qmerge.errors import CheckFailed, UsageProblem

CARD = "README.md"


@click.command("push", cls=QuietCommand, short_help="Send a verified checkpoint to the hub.", example="qmerge push OUT --repo ORG/NAME\nqmerge push OUT --repo ORG/NAME --yes")
@click.argument("out", type=PLACE)
@click.option("--repo", metavar="ORG/NAME", required=True, help="The model repository on the hub; created where there is none.")
@click.option("--yes", is_flag=True, help="Do it. Without it nothing is sent: what would be is listed.")
@click.option("--public", is_flag=True, help="For everybody to see (default: private).")
@click.option("--replace", is_flag=True, help="The repository may hold files: it then holds this checkpoint and nothing else.")
@click.option("--base", type=PLACE, metavar="PATH", help="As in verify: derive everything again before it is sent.")
@click.option("--adapter", "adapters", type=PLACE, metavar="PATH", multiple=True, help="The adapter it was made from; several in the order of the merge.")
@click.option("--signature", type=PLACE, metavar="FILE", help="A signature of OUT (docs/signing.md): verified, and sent as model.sig.")
@click.option("--public-key", type=PLACE, metavar="FILE", help="The key that it has to be of.")
@json_option("repo, private, files, bytes; once it was sent, revision, url and deleted too")
def push_command(
    out: str, repo: str, yes: bool, public: bool, replace: bool, base: str | None, adapters: tuple[str, ...], signature: str | None, public_key: str | None, as_json: bool
) -> None:
    """Verify OUT, then send the manifest's files and the manifest to the hub: one commit, private unless asked otherwise. Logs, evidence and other files never go."""
    from qmerge.report.card import HUB_ID

    if not HUB_ID.fullmatch(repo):
        raise UsageProblem("this is no id of the hub", where="--repo", expected="ORG/NAME", found=repo, fix="write it as it stands in the address of the model: https://huggingface.co/ORG/NAME")
    check_asked(out, base, adapters, signature, public_key, "qmerge push")
    from qmerge.pipeline.verify import verify
    from qmerge.store.manifest import read_manifest
    from qmerge.store.push import parcel, push

    checks = verify(out, base, adapters, False, signature, public_key)
    for check in checks:
        say(f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.detail}")
    if failed := [check for check in checks if not check.passed]:
        raise CheckFailed("a checkpoint that does not verify is not pushed", where=out, found=failed[0].detail, fix="merge again", written="nothing")
    folder = Path(out)
    sent = parcel(folder, read_manifest(folder), repo, not public, Path(signature) if signature else None)
    if not yes:
        _show(sent, as_json)
        if CARD not in sent.paths:
            warn(f"there is no model card: qmerge card {out} --id {repo} makes one")
        say("dry run: nothing was sent. Next: the same command with --yes")
        return
    done = push(sent, replace)
    row = {"repo": done.repo, "revision": done.revision, "url": done.url, "private": done.private, "files": len(sent.paths), "bytes": sent.total_bytes, "deleted": list(done.deleted)}
    if as_json:
        result_json(row)
    else:
        result(f"{done.repo} at {done.revision}: {row['files']} files, {row['bytes']} bytes, {'private' if done.private else 'public'}, as the manifest names them")
    if done.deleted:
        say(f"deleted there: {', '.join(done.deleted[:10])}" + (f" and {len(done.deleted) - 10} more" if len(done.deleted) > 10 else ""))
    say(f"Next: hf download {repo} --revision {done.revision} --local-dir DIR, then qmerge verify DIR")


def _show(sent: Any, as_json: bool) -> None:
    from qmerge.units import format_bytes

    if as_json:
        result_json({"repo": sent.repo, "private": sent.private, "bytes": sent.total_bytes, "files": {name: digest["bytes"] for name, digest in sent.digests.items()}, "sent": False})
        return
    rows = [f"{sent.repo}, {'private' if sent.private else 'PUBLIC'}: {len(sent.paths)} files, {format_bytes(sent.total_bytes)}"]
    result("\n".join(rows + [f"  {name}  {format_bytes(digest['bytes'])}" for name, digest in sent.digests.items()]))
