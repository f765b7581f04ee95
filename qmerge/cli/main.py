"""The `qmerge` command: which words does it know, and how does an error reach the person?"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import traceback

import click

from qmerge import __version__
from qmerge.cli.bench import bench_command
from qmerge.cli.card import card_command
from qmerge.cli.completing import completion_command
from qmerge.cli.evidence import eval_command
from qmerge.cli.gate import compare_command
from qmerge.cli.helping import HelpfulGroup
from qmerge.cli.inspect import inspect_command
from qmerge.cli.merge import merge_command
from qmerge.cli.output import Streams, coloured
from qmerge.cli.push import push_command
from qmerge.cli.recipe import recipe_group
from qmerge.cli.reporting import advise_command, report_command
from qmerge.cli.run import run_command
from qmerge.cli.several import check_alone
from qmerge.cli.verify import verify_command
from qmerge.errors import EXIT_CODES, QmergeError, printable

EPILOG = f"Exit codes: {', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}."


PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""errors that a path has, not the program"""
SYSTEM = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
"""errors that another day may not have"""
NO_MEMORY = ("can't allocate memory", "can't start new thread", "cannot allocate memory", "failed to map segment", "unable to mmap")
"""what libraries say, in errors of many types"""


@click.group(cls=HelpfulGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EPILOG)
@click.version_option(__version__, prog_name="qmerge")
@click.pass_context
def cli(context: click.Context) -> None:
    """Merge a QLoRA adapter into its 4-bit base, keep the fine-tune in 4 bits, and measure what it cost.

    \b
    First time? Look at what you have, then do it all in one go:
      qmerge inspect BASE
      qmerge inspect ADAPTER
      qmerge run --base BASE --adapter ADAPTER --calibration train.jsonl --out OUT

    BASE and ADAPTER are folders or hub ids; OUT is a new folder; train.jsonl is text like what the adapter was trained on.
    """
    check_alone(context.invoked_subcommand, context.find_object(Streams))


for title, commands in (
    ("Begin", (inspect_command, recipe_group)),
    ("Merge", (run_command, merge_command)),
    ("Measure and judge", (eval_command, compare_command, report_command, advise_command, bench_command)),
    ("Ship", (verify_command, card_command, push_command)),
    ("Shell", (completion_command,)),
):
    cli.add_part(title, *commands)


def main() -> None:
    """Entry point: runs a command and turns every error of ours into a message and an exit code."""
    # set before transformers is imported: it reads this on import
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    loud = bool(os.environ.get("QMERGE_VERBOSE"))
    _ready_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: clean up and exit 75; not where nohup or a shell wants it ignored
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    streams = None if loud else Streams()
    try:
        code = cli.main(standalone_mode=False, obj=streams, prog_name="qmerge")
    except BaseException as problem:
        if streams:
            streams.restore()
        sys.exit(_explain(problem, streams, loud))
    if streams:
        streams.restore()
    sys.exit(code if isinstance(code, int) else 0)


def _ready_streams() -> None:
    """Standard streams that were closed at the start (``2>&-``, some services): the next file that is opened would get their number, and what a library says on stderr would be written into it.
    And they write every letter, whatever the locale."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):  # in a locale that has no ×, an error after hours
            stream.reconfigure(errors="backslashreplace")


def _explain(problem: BaseException, streams: Streams | None, loud: bool) -> int:
    """Say what happened on stderr and give the exit code. Errors that are not ours keep their traceback, with what the libraries said last."""
    if isinstance(problem, click.exceptions.Exit):
        return problem.exit_code
    if isinstance(problem, SystemExit):  # click's own way out where the reader of stdout has gone away
        return problem.code if isinstance(problem.code, int) else 1
    if isinstance(problem, (click.exceptions.Abort, KeyboardInterrupt)):
        _print_error("interrupted\n  written:    nothing\n  what to do: run the same command again")
        return 75
    if isinstance(problem, click.ClickException):
        with contextlib.suppress(OSError, ValueError):
            problem.show()
        return 2
    if isinstance(problem, QmergeError) and not loud:
        _print_error(str(problem))
        return problem.exit_code
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        _print_error("no room left on the disk\n  written:    nothing at the output, unless a line above says so\n  what to do: free some space and run the same command again")
        return 75
    if isinstance(problem, OSError) and problem.errno in PLACES and not loud:
        _print_error(f"a file or folder cannot be used\n  where:      {problem.filename or 'not known'}\n  found:      {problem.strerror}\n  what to do: check the path and its permissions, then run the same command again")
        return 1
    if told := _of_the_machine(problem):
        _print_error(told)
        return 75
    if isinstance(problem, FileNotFoundError) and problem.filename is None and _nowhere():
        _print_error("the folder that this was started in is not there any more\n  what to do: cd into one that is")
        return 1
    if streams and (last := streams.talk.getvalue().strip()):
        click.echo("the libraries' last words:\n  " + "\n  ".join(printable(last).splitlines()[-12:]), err=True)
    with contextlib.suppress(OSError, ValueError):
        traceback.print_exception(problem, file=sys.stderr if not isinstance(sys.stderr, io.StringIO) else sys.__stderr__)  # also of a rank that another talks for
    return problem.exit_code if isinstance(problem, QmergeError) else 1


def _of_the_machine(problem: BaseException) -> str | None:
    """What to say where memory or the system failed, and not this program; None for all else."""
    said = str(problem)
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError" or any(words in said.lower() for words in NO_MEMORY) or getattr(problem, "errno", None) == errno.ENOMEM:
        return "there is not enough memory\n  written:    nothing at the output, unless a line above says so\n  what to do: raise the limit (ulimit -v, the control group) or use a machine with more memory, then run the same command again"
    if isinstance(problem, OSError) and problem.errno in SYSTEM:
        return f"a disk or the system failed\n  where:      {printable(str(problem.filename or 'not known'))}\n  found:      {problem.strerror}\n  what to do: run the same command again once it works"
    return None


def _nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _print_error(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        click.echo(f"{coloured('error', 'red')}: {message}", err=True)
