"""How does ``--help`` look? What is needed first, options by topic where they are many, an example at the end."""

from __future__ import annotations

from typing import Any

import click

TOPIC = "qmerge_topic"
"""the attribute of an option that names its topic; `qmerge.cli.options.topic` sets it"""
NEEDED, OPTIONS = "Needed", "Options"
INPUTS, RECIPE, FORMAT, CALIBRATION = "Needed, here or in the recipe", "Recipe", "Format", "Calibration"
SOLVER, BASE, SEVERAL, MEASURE, JUDGE, RUNNING = "Solver", "Which base", "Several adapters", "Measuring", "Judging", "Running"
ORDER = (NEEDED, INPUTS, CALIBRATION, FORMAT, RECIPE, SOLVER, MEASURE, JUDGE, BASE, SEVERAL, RUNNING, OPTIONS)
HELP_OPTIONS = ["-h", "--help"]
MANY = 12
"""options beside the needed ones, from which on topics are easier to read than one list"""


class HelpfulCommand(click.Command):
    """``example``: command lines to copy, shown last and as they are."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings.setdefault("help_option_names", HELP_OPTIONS)  # click keeps the option as it is first asked for, by whatever context
        self.example = example.strip()

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        needed = [f"{option.opts[0]} {option.make_metavar(ctx)}" for option in self.get_params(ctx) if isinstance(option, click.Option) and topic_of(option) in (NEEDED, INPUTS)]
        return [*needed, *super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in sections(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=28)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.example:
            with formatter.section("Example"):
                formatter.write("".join(f"  {line}\n" for line in self.example.splitlines()))


class HelpfulGroup(click.Group):
    """A group whose commands are listed in the order in which they were added, that of use, under the titles that `add_part` gives them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings.setdefault("help_option_names", HELP_OPTIONS)
        self.parts: dict[str, str] = {}

    def add_part(self, title: str, *commands: click.Command) -> None:
        for command in commands:
            self.add_command(command)
            self.parts[str(command.name)] = title

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            if not command.hidden:
                found.setdefault(self.parts.get(name, "Commands"), []).append((name.ljust(max(map(len, self.commands))), command.get_short_help_str(200)))
        for title, rows in found.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def topic_of(parameter: click.Parameter) -> str:
    return str(getattr(parameter, TOPIC, NEEDED if parameter.required else OPTIONS))


def sections(command: click.Command, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
    """Title -> (how an option is written, what it does), in the order of ``--help``."""
    shown = [(topic_of(parameter), row) for parameter in command.get_params(ctx) if (row := parameter.get_help_record(ctx)) is not None and row[1]]
    many = sum(topic not in (NEEDED, INPUTS) for topic, _ in shown) >= MANY
    found: dict[str, list[tuple[str, str]]] = {title: [] for title in ORDER}
    for title, (name, text) in shown:
        place = title if title in (NEEDED, INPUTS) else (RUNNING if title == OPTIONS else title) if many else OPTIONS
        found[place].append((name, text.replace("  [required]", "")))
    return {title: rows for title, rows in found.items() if rows}
