"""How is a YAML file read without trusting it?

Plain data only (PyYAML's safe loader), capped in bytes, in depth and in what its aliases expand to (ten lines can stand for a billion values), no key twice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qmerge.store.regular import read_plain

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
MAX_DEPTH = 50


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"))


class _Loader(yaml.SafeLoader):
    """PyYAML's, but 1e-5 is a number, as in JSON and YAML 1.2; YAML 1.1 wants 1.0e-5 and takes the other for text."""

    yaml_implicit_resolvers = {first: [*rows, _FLOAT] if first and first in "-+0123456789" else rows for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()}


class BadYaml(ValueError):
    """Why it is not read, in one line."""


def read_yaml(path: Path | str) -> Any:
    """The data in the file ``path`` (JSON is YAML too). Raises BadYaml, and OSError where the file cannot be read."""
    try:
        raw = read_plain(path, MAX_BYTES)
    except ValueError as problem:
        raise BadYaml(f"it is too large for a file of settings: {problem}") from None
    try:
        return parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise BadYaml(f"it is not UTF-8 text: byte {problem.start}") from None


def parse_yaml(text: str) -> Any:
    """The data in ``text``. Raises BadYaml: no YAML, tags that are not plain data, a key twice, aliases in a ring, too deep, or too much once aliases are expanded."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError as problem:
        raise BadYaml(_one_line(problem)) from None
    except RecursionError:
        raise BadYaml("nested too deeply") from None
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError) as problem:  # a date in the 99th month, a number of 5000 digits, a list as a key
        raise BadYaml(str(problem) or type(problem).__name__) from None
    finally:
        if loader is not None:
            loader.dispose()


def _measure(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """How many values ``node`` stands for, aliases expanded. ``known``: by node; None while it is being counted."""
    if id(node) in known:
        if (size := known[id(node)]) is None:
            raise BadYaml("an alias contains itself")
        return size
    if depth > MAX_DEPTH:
        raise BadYaml("nested too deeply")
    known[id(node)] = None
    size = 1
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            _name(key)
        size += sum(_measure(part, known, depth + 1) for pair in node.value for part in pair)
        _check_keys(node)
    elif isinstance(node, yaml.ScalarNode):
        node.value = _whole(node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_measure(part, known, depth + 1) for part in node.value)
    if size > MAX_VALUES:
        raise BadYaml(f"it stands for more than {MAX_VALUES} values")
    known[id(node)] = size
    return size


def _name(key: yaml.Node) -> None:
    """``on`` is a name here, as in YAML 1.2; YAML 1.1 reads the key as true."""
    if key.tag == "tag:yaml.org,2002:bool" and str(key.value).lower() not in ("true", "false"):
        key.tag = "tag:yaml.org,2002:str"


def _whole(text: str) -> str:
    """JSON spells a character beyond 16 bits as two escapes, of which PyYAML makes two halves."""
    try:
        return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise BadYaml("it holds half a character") from None


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise BadYaml(f"the key {key.value[:80]!r} appears twice (line {key.start_mark.line + 1})")
            seen.add((key.tag, key.value))


def _one_line(problem: yaml.YAMLError) -> str:
    """PyYAML's words; a mark's place without the file's name, which is a buffer's here."""
    mark, words = getattr(problem, "problem_mark", None), getattr(problem, "problem", None)
    if words and mark is not None:
        return f"{words} (line {mark.line + 1}, column {mark.column + 1})"
    return (str(problem).splitlines() or ["no YAML"])[0]
