"""What does docs/errors.md say? Every message that qmerge ends with, read from the places in the code that make them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmerge import errors
from qmerge.errors import EXIT_CODES, QmergeError

PACKAGE = Path(errors.__file__).parent
KINDS = {name: kind.exit_code for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, QmergeError)}
TOPICS = {
    "cli": "The command line", "api": "The command line", "extras": "The command line", "launch": "Several processes", "ranks": "Several processes", "watch": "Several processes", "device": "The machine",
    "store": "Files, folders and the hub", "adapters": "The adapter", "formats": "Weight formats", "pipeline": "Merging and requantizing", "quality": "Measuring and judging", "report": "Results and reports",
    "numerics": "Merging and requantizing",
}  # fmt: skip
"""layer -> heading; in the order of the page"""
RECIPE = "Recipes and options of a merge"
HEAD = """# All errors

Made from the code by `python scripts/write_generated.py`; a test holds it current. What to do about the common ones, at more length: [troubleshooting.md](troubleshooting.md).

Search for words of the message. *{{Braces}}* stand for values; a stroke parts alternatives. A message on the screen also has lines for where, what was expected and found, and what was written. The number is
the exit code: {codes}; rows without one are said inside another message.

{count} messages.
"""


@dataclass(frozen=True)
class Message:
    """One place in the code: its heading and file, the words with gaps for values, and the exit code; 0 for what is only said inside other messages."""

    topic: str
    file: str
    what: str
    fix: str
    code: int


def page() -> str:
    """docs/errors.md."""
    found = messages()
    rows = [HEAD.format(count=len(found), codes=", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items() if code))]
    for topic in dict.fromkeys([RECIPE, *TOPICS.values()]):
        here = [message for message in found if message.topic == topic]
        if here:
            rows.append(f"\n## {topic}\n\n| message | what to do, or what was expected | code |\n| --- | --- | --- |")
            rows += [f"| {_cell(message.what)} | {_cell(message.fix)} | {message.code or ''} |" for message in here]
    return "\n".join(rows) + "\n"


def messages() -> list[Message]:
    """Each once, in the order of the topics, then of the words."""
    found: dict[tuple[str, str, int], Message] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        name = file.relative_to(PACKAGE).as_posix()
        topic = RECIPE if name.startswith("pipeline/recipe") else TOPICS.get(layer, "The machine")
        if layer == "errors":
            continue
        for what, fix, raised in _in_file(ast.parse(file.read_text("utf-8"))):
            code = raised or (KINDS["UsageProblem"] if topic == RECIPE else 0)
            if re.search(r"[A-Za-z]{3}", re.sub(r"\{[^}]*\}", "", what)):
                found.setdefault((topic, what, code), Message(topic, name, what, fix, code))
    order = list(dict.fromkeys([RECIPE, *TOPICS.values()]))
    return sorted(found.values(), key=lambda message: (order.index(message.topic), re.sub(r"\W", "", message.what).lower(), message.code))


def _in_file(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """(message, what to do, exit code)"""
    names = {target.id: words(node.value) for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.JoinedStr)) for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_fault"):
            yield from ((words(inner.value, names), "", 0) for inner in ast.walk(node) if isinstance(inner, ast.Return) and isinstance(inner.value, ast.JoinedStr))
        if not isinstance(node, ast.Call):
            continue
        called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        owner = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        if called in KINDS and node.args:
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            expected = words(given["expected"], names) if "expected" in given else ""
            yield words(node.args[0], names), words(given["fix"], names) if "fix" in given else f"expected: {expected}" if expected else "", KINDS[called]
        elif called == "append" and owner == "faults" and node.args:
            yield words(node.args[0], names), "", 0
        elif called == "_print_error" and node.args:
            what, _, rest = words(node.args[0], names).partition("\n")
            yield what, rest.partition("what to do: ")[2], 75 if "interrupted" in what or "room" in what else 1


def words(node: ast.expr, names: dict[str, str] | None = None) -> str:
    """A message as it is written in the code, with ``{what it is}`` for values and ``a / b`` for alternatives."""
    names = names or {}
    if isinstance(node, ast.Constant):
        return str(node.value) if node.value is not None else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return words(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left, names) + words(node.right, names)
    if isinstance(node, ast.IfExp):
        both = [part for part in (words(node.body, names), words(node.orelse, names)) if part]
        return " / ".join(both) if len(both) == 2 else f"[{both[0]}]" if both else ""
    if isinstance(node, ast.BoolOp):
        return " / ".join(filter(None, (words(part, names) for part in node.values)))
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    return "{" + (_named(node).replace("_", " ").strip() or "…") + "}"


def _named(node: ast.expr) -> str:
    """What a value is, by the names in its expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, (ast.Subscript, ast.Starred, ast.NamedExpr)):
        return _named(node.value)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp)):
        return _named(node.generators[0].iter)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "len" and node.args:
            return f"number of {_named(node.args[0])}"
        if isinstance(node.func, ast.Name) and node.func.id in ("type", "repr", "str", "sorted", "map", "set", "list", "format_bytes", "format_seconds", "max", "min") and node.args:
            return _named(node.args[-1])
        if isinstance(node.func, ast.Attribute) and node.func.attr == "join" and node.args:
            return _named(node.args[0])
        return _named(node.func)
    if isinstance(node, ast.BinOp):
        return _named(node.left) or _named(node.right)
    return ""


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    for sign in "\\|<>*_`":
        text = text.replace(sign, f"\\{sign}")
    return re.sub(r"\{([^}]*)\}", r"*{\1}*", text)
