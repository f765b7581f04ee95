"""The `qmerge` command: which words does it know, and how does an error reach the person?"""

from __future__ import annotations

import os
import sys

import click

from qmerge import __version__
from qmerge.cli.evidence import compare_command, eval_command, report_command
from qmerge.cli.inspect import inspect_command
from qmerge.cli.merge import merge_command
from qmerge.cli.run import run_command
from qmerge.cli.verify import verify_command
from qmerge.errors import QmergeError

EPILOG = "Exit codes: 0 fine, 1 failed, 2 malformed command or recipe, 3 quality below budget, 4 inputs refused (nothing written), 75 interrupted or out of room."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EPILOG)
@click.version_option(__version__, prog_name="qmerge")
def cli() -> None:
    """Merge a QLoRA adapter into its 4-bit base, keep the fine-tune in 4 bits, and measure what it cost.

    Start with `qmerge inspect PATH`, then `qmerge run --base … --adapter … --out … --calibration …`.
    """


for command in (inspect_command, merge_command, eval_command, compare_command, report_command, verify_command, run_command):
    cli.add_command(command)


def main() -> None:
    """Entry point: runs a command and turns every error of ours into a message and an exit code."""
    # set before bitsandbytes, transformers and gptqmodel are imported: they talk on import
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _stop("interrupted", 75)
    except click.ClickException as problem:
        problem.show()
        sys.exit(2)
    except QmergeError as problem:
        if os.environ.get("QMERGE_TRACEBACK"):
            raise
        _stop(str(problem), problem.exit_code)
    except KeyboardInterrupt:
        _stop("interrupted; nothing was published", 75)
    except OSError as problem:
        if problem.errno == 28:
            _stop(f"no room left on the disk\n  what to do: free some space and run the command again\n  written:    nothing ({problem.strerror})", 75)
        if os.environ.get("QMERGE_TRACEBACK"):
            raise
        _stop(f"{problem.strerror or problem}\n  where:      {problem.filename or 'unknown'}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> None:
    click.echo(f"{click.style('error', fg='red')}: {message}", err=True)
    sys.exit(code)
