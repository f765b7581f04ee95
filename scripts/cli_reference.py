"""What does docs/cli.md say? Every command with its ``--help``, and what all commands share, from the click tree itself."""

from __future__ import annotations

from collections.abc import Iterator

import click

from qmerge.cli.main import cli
from qmerge.errors import EXIT_CODES

WIDTH = 110
HEAD = """# Commands

Made from the code by `python scripts/write_generated.py`; a test holds it current. The same text: `qmerge COMMAND --help`.

{index}

## What all commands share

Results go to standard output, everything else to standard error: a pipe gets results alone. Errors say what, where, what was expected and found, what to do, and what was written; all of them: [errors.md](errors.md).

| exit code | meaning |
| --- | --- |
{codes}

**`--json`** puts one JSON document on standard output and nothing else there. A command that fails before it has a result leaves standard output empty; `verify`, `compare` and `run` print theirs also where it is bad news, with exit code 1 or 3.

| command | its document |
| --- | --- |
{documents}
| `qmerge recipe schema` | is a JSON Schema itself |

**Progress** goes to standard error: one line per finished step. On a terminal a counter runs in place, and what is left is told; off a terminal (and with `TERM=dumb`) there are the lines alone. `NO_COLOR=1` turns colours off; off a terminal there are none.

| environment variable | effect |
| --- | --- |
| `NO_COLOR` | not empty: no colours |
| `QMERGE_VERBOSE` | not empty: what the libraries print is shown as it comes, and errors keep their traceback |

**Recipes.** `--recipe FILE` reads settings from YAML; flags win over it. `qmerge recipe init` writes one with every setting, its default and a line about it; its first line tells editors with a YAML language server where the schema is, so that they complete and check it. `-` and `_` mean the same in names.

```yaml
# yaml-language-server: $schema=./qmerge-recipe.schema.json
base: BASE
adapter: [ADAPTER]
out: OUT
format: compressed-tensors
bits: 4
calibration: train.jsonl
```

**Completion.** `eval "$(qmerge completion bash)"` in `~/.bashrc`; the same with `zsh` in `~/.zshrc`; `qmerge completion fish > ~/.config/fish/completions/qmerge.fish`.
"""


def reference() -> str:
    """docs/cli.md."""
    found = list(_walk(cli, click.Context(cli, info_name="qmerge")))
    documents = [(path, option.help or "") for path, command, _ in found for option in command.params if isinstance(option, click.Option) and "--json" in option.opts]
    head = HEAD.format(
        index="\n".join(f"- [`{path}`](#{path.replace(' ', '-')}): {command.get_short_help_str(200)}" for path, command, _ in found),
        codes="\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
        documents="\n".join(f"| `{path}` | {text.partition(': ')[2].rstrip('.')} |" for path, text in documents),
    )
    return head + "".join(f"\n## {path}\n\n```text\n{_help(command, context)}\n```\n" for path, command, context in found)


def _walk(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """(``qmerge recipe init``, the command, its context), in the order of ``--help``; groups before what they hold."""
    for name in group.list_commands(context):
        command = group.commands[name]
        inner = click.Context(command, info_name=name, parent=context, terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=["-h", "--help"])
        yield inner.command_path, command, inner
        if isinstance(command, click.Group):
            yield from _walk(command, inner)


def _help(command: click.Command, context: click.Context) -> str:
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
