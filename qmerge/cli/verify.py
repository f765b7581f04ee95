"""`qmerge verify`: is a written checkpoint what it claims to be?"""

from __future__ import annotations

import click

from qmerge.api.looking import check_asked
from qmerge.cli.completing import PLACE
from qmerge.cli.options import json_option
from qmerge.cli.output import QuietCommand, result, result_json, say
from qmerge.errors import CheckFailed


@click.command("verify", cls=QuietCommand, short_help="Is a checkpoint what it claims to be?", example="qmerge verify OUT\nqmerge verify OUT --base BASE --adapter ADAPTER")
@click.argument("out", type=PLACE)
@click.option("--base", type=PLACE, metavar="PATH", help="The base it was made from: then every tensor is derived again.")
@click.option("--adapter", "adapters", type=PLACE, metavar="PATH", multiple=True, help="The adapter it was made from; several in the order of the merge.")
@click.option("--allow-pickle", is_flag=True, help="Read an adapter_model.bin (a pickle can run code): in a child process with weights_only.")
@click.option("--signature", type=PLACE, metavar="FILE", help="A signature of OUT by model-transparency (docs/signing.md).")
@click.option("--public-key", type=PLACE, metavar="FILE", help="The key that it has to be of.")
@json_option("out, passed, checks")
def verify_command(out: str, base: str | None, adapters: tuple[str, ...], allow_pickle: bool, signature: str | None, public_key: str | None, as_json: bool) -> None:
    """Is OUT what its manifest says? Files are hashed again, codes unpacked, configs checked; with --base and --adapter every tensor is derived again from them.

    Exit 1 where a check fails, 4 where there is nothing to check.
    """
    check_asked(out, base, adapters, signature, public_key, "qmerge verify")
    from qmerge.pipeline.verify import verify

    checks = verify(out, base, adapters, allow_pickle, signature, public_key)
    failed = [check for check in checks if not check.passed]
    if as_json:
        result_json({"out": out, "passed": not failed, "checks": [{"check": check.name, "passed": check.passed, "detail": check.detail} for check in checks]})
    else:
        for check in checks:
            result(f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.detail}")
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(checks)} checks failed", where=out, found=f"{failed[0].name}: {failed[0].detail}", fix="do not serve this checkpoint; merge again")
    say(f"Next: qmerge eval, serve it, or qmerge push {out} --repo ORG/NAME" if base else f"Next: qmerge verify {out} --base P --adapter P derives it again from its inputs")
