"""What may an evaluation be asked for, in names and words? Checked without torch and before anything is read, so that a misspelt one is refused at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmerge.errors import UsageProblem
from qmerge.quality.compare import REFERENCE_ARMS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
EXTRA_ARMS = ("rtn", "original")
"""``--also``"""
DEFAULTS: dict[str, dict[str, int | None]] = {
    "gptq": {"tokens": 2048, "windows": None},
    "strided": {"tokens": 1024, "stride": None, "windows": None},
    "llama.cpp": {"tokens": 512, "windows": None},
    "lm-eval": {"tokens": None},
}
"""settings by protocol; ``tokens`` None: the model's context, ``stride`` None: half of ``tokens``, ``windows`` None: all of them"""
SPELLING = "PROTOCOL[,KEY=N…]:FILE, as in gptq:wiki.txt or strided,tokens=512,stride=128:wiki.txt"


@dataclass(frozen=True)
class Request:
    """One ``--perplexity``: ``settings`` holds what was given, no defaults."""

    protocol: str
    settings: dict[str, int]
    source: str

    @property
    def label(self) -> str:
        """The request as it was written, with the file's stem: a name for the results that holds no folder."""
        how = ",".join([self.protocol, *(f"{key}={number}" for key, number in self.settings.items())])
        return f"{how}:{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(self.source).stem)}"


def parse_requests(texts: Iterable[str]) -> dict[str, Request]:
    """``--perplexity`` arguments by label. ``UsageProblem`` for a malformed one and for the same one twice."""
    found: dict[str, Request] = {}
    for text in texts:
        request = _parse(text)
        if request.label in found:
            raise UsageProblem("two perplexities have the same name", where=f"--perplexity {text}", found=request.label, fix="give one of the files another name")
        found[request.label] = request
    return found


def check_request(candidates: dict[str, str], texts: dict[str, str], also: Sequence[str], original: str | None) -> None:
    """Raise ``UsageProblem`` for names and extra arms that an evaluation would refuse; costs nothing, so that callers can ask before long work."""
    for what, names in (("candidate", candidates), ("text", texts)):
        for name in names:
            if not NAME.fullmatch(name) or (what == "candidate" and name in (*REFERENCE_ARMS, "served")):
                raise UsageProblem(f"this name cannot be used for a {what}", expected=f"letters, digits, . _ -, and none of {', '.join(REFERENCE_ARMS)}", found=name)
    unknown = set(also) - set(EXTRA_ARMS)
    if unknown:
        raise UsageProblem("there is no such extra arm", expected=", ".join(EXTRA_ARMS), found=", ".join(sorted(unknown)))
    if "original" in also and original is None:
        raise UsageProblem("the arm `original` needs the float base", expected="--original PATH", found="none")
    if not texts:
        raise UsageProblem("an evaluation needs text", expected="at least one --text", found="none")


def candidate_names(paths: Iterable[str | Path]) -> dict[str, str]:
    """Folder names as arm names: unique (``-2``, ``-3`` …), of plain characters, and never the name of a reference arm."""
    named: dict[str, str] = {}
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).resolve().name).lstrip("-._") or "candidate"
        stem = f"candidate-{stem}" if stem in (*REFERENCE_ARMS, "served") else stem
        name, number = stem, 2
        while name in named:
            name, number = f"{stem}-{number}", number + 1
        named[name] = str(path)
    return named


def _parse(text: str) -> Request:
    how, colon, source = text.partition(":")
    protocol, *pairs = how.split(",")
    where = f"--perplexity {text}"
    if not colon or not source:
        raise UsageProblem("a perplexity names its protocol and its text", where=where, expected=SPELLING, found=text)
    if protocol not in DEFAULTS:
        raise UsageProblem("there is no such perplexity protocol", where=where, expected=", ".join(DEFAULTS), found=protocol)
    known, settings = DEFAULTS[protocol], {}
    for pair in pairs:
        key, _, number = pair.partition("=")
        if key not in known or key in settings:
            raise UsageProblem(f"{protocol} has no such setting, or it is given twice", where=where, expected=", ".join(f"{name}=N" for name in known), found=pair)
        if not number.isascii() or not number.isdigit() or int(number) < (1 if key == "windows" else 2):
            raise UsageProblem(f"{key} is no number of tokens or windows", where=where, expected="a whole number, 2 or more (windows: 1)", found=number or "nothing")
        settings[key] = int(number)
    return Request(protocol, settings, source)
