"""How does ``--help`` look? What is needed first, options by topic where they are many, an example at the end."""

from __future__ import annotations

import click

TOPIC = "qmerge_topic"
"""the attribute of an option that names its topic; `qmerge.cli.options.topic` sets it"""
OTHERS = "Options"


class HelpfulCommand(click.Command):
    """``example``: command lines to copy, shown last and as they are."""

    def __init__(self, *args: object, example: str = "", **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.example = example

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Needed options first, then topics in the order in which they come, then the rest."""
        topics: dict[str, list[tuple[str, str]]] = {}
        for parameter in sorted(self.get_params(ctx), key=_order):
            if (row := parameter.get_help_record(ctx)) is not None:
                topics.setdefault(topic_of(parameter), []).append(row)
        rest = topics.pop(OTHERS, [])
        for title, rows in (*topics.items(), (OTHERS, rest)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=28)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        if self.example:
            with formatter.section("Example"):
                formatter.write("".join(f"  {line}\n" for line in self.example.strip().splitlines()))


def topic_of(parameter: click.Parameter) -> str:
    return str(getattr(parameter, TOPIC, "Needed" if parameter.required else OTHERS))


def _order(parameter: click.Parameter) -> bool:
    return not topic_of(parameter).startswith("Needed")


class HelpfulGroup(click.Group):
    """A group whose commands are listed in the order in which they were added: that of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
