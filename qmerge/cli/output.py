"""Where do results and talk go? Results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click


def result(text: str) -> None:
    click.echo(text)


def result_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def say(text: str) -> None:
    click.echo(text, err=True)


def warn(text: str) -> None:
    click.echo(f"{click.style('warning', fg='yellow')}: {text}", err=True)


class Steps:
    """Calm progress: one line per finished step with the time since the start; on a terminal a counter runs in place."""

    def __init__(self) -> None:
        self.began, self.live, self.label = time.perf_counter(), sys.stderr.isatty(), ""

    def step(self, text: str) -> None:
        self._clear()
        say(f"{time.perf_counter() - self.began:7.1f} s  {text}")

    def count(self, label: str, done: int, total: int) -> None:
        if done >= total:
            self.step(label)
        elif self.live:
            self.label = f"{label} {done}/{total}"
            click.echo(f"\r           {self.label}", err=True, nl=False)

    def _clear(self) -> None:
        if self.live and self.label:
            click.echo("\r" + " " * (len(self.label) + 12) + "\r", err=True, nl=False)
            self.label = ""
