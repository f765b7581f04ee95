"""Where do results and talk go? Results to stdout, everything else to stderr."""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any, TextIO

import click

from qmerge.errors import UsageProblem, printable


class Streams:
    """The terminal's own streams, kept for qmerge, while what libraries print on import and on loading goes to ``talk``.

    Their banners and bars would drown the result, and some print to stdout. ``talk`` is shown where a run ends in an error that is not one of ours.
    """

    def __init__(self) -> None:
        self.out, self.err, self.talk = sys.stdout, sys.stderr, io.StringIO()

    def keep(self) -> None:
        sys.stdout = sys.stderr = self.talk

    def mute(self) -> None:
        """Say nothing at all: another process talks for this one."""
        self.out = self.err = self.talk

    def restore(self) -> None:
        sys.stdout, sys.stderr = self.out, self.err


class QuietCommand(click.Command):
    """A command whose body runs with the libraries' talk kept away; its parsing and its ``--help`` do not."""

    def invoke(self, ctx: click.Context) -> Any:
        _refuse_empty(ctx)
        if streams := ctx.find_object(Streams):
            streams.keep()
        return super().invoke(ctx)


def _refuse_empty(ctx: click.Context) -> None:
    """``--baseline "$ACCEPTED"`` with a variable that is not set must not be a gate without a baseline."""
    for parameter in ctx.command.params:
        given = ctx.params.get(parameter.name)
        if ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE and ("" in given if isinstance(given, tuple) else given == ""):
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(ctx)
            raise UsageProblem("an empty value was given", where=name, expected="a value, or no such option", found="''", fix="is a shell variable not set?")


def _streams() -> tuple[TextIO, TextIO]:
    context = click.get_current_context(silent=True)
    kept = context.find_object(Streams) if context else None
    return (kept.out, kept.err) if kept else (sys.stdout, sys.stderr)


def result(text: str) -> None:
    """A line of what was asked for. Names of strangers' files in it reach no terminal as commands, here and below."""
    click.echo(printable(text), file=_streams()[0])


def result_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    click.echo(text if printable(text) == text else json.dumps(value, indent=2, default=str), file=_streams()[0])


def say(text: str) -> None:
    click.echo(printable(text), file=_streams()[1])


def warn(text: str) -> None:
    click.echo(f"{click.style('warning', fg='yellow')}: {printable(text)}", file=_streams()[1])


class Steps:
    """Calm progress: one line per finished step with the time since the start; on a terminal a counter runs in place."""

    def __init__(self) -> None:
        self.began, self.live, self.label = time.perf_counter(), _streams()[1].isatty(), ""

    def step(self, text: str) -> None:
        self._clear()
        say(f"{time.perf_counter() - self.began:7.1f} s  {text}")

    def count(self, label: str, done: int, total: int) -> None:
        if done >= total:
            self.step(label)
        elif self.live:
            self.label = f"{printable(label)} {done}/{total}"
            click.echo(f"\r           {self.label}", file=_streams()[1], nl=False)

    def _clear(self) -> None:
        if self.live and self.label:
            click.echo("\r" + " " * (len(self.label) + 12) + "\r", file=_streams()[1], nl=False)
            self.label = ""
