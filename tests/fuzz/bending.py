"""How is a JSON or YAML document bent so that its syntax mostly holds while its meaning breaks?

A document is a tree of ``Pairs`` (an object, whose keys may repeat), lists and ``Raw`` texts (numbers and whatever JSON cannot say). Every function takes its
choices from a ``random.Random``: libFuzzer's mutator gives one by seed, Hypothesis one that it can shrink.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from random import Random
from typing import Any

MAX_NODES = 3000
"""of a larger tree only the beginning is bent"""


class Pairs(list[Any]):
    """The members of an object, in order, as ``[key, value]`` lists."""


class Raw(str):
    """Text that stands in the document as it is."""


STRINGS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "a" * 300, "x/" * 40, "model.safetensors", "\ud800", "\udfff\ud800", "\x00", "\x1b[31mred\x1b[0m", "\u202eevil", "\n# head\n", "\u2028",
    "<script>alert(1)</script>", "\"'><svg/onload=x>", "</style><b>", "{{7*7}}", "{%raw%}", "{x}", "{0.__class__}", "[a](javascript:x)", "|", "`", "😀", "ſ", "é", "null", "true", "1", "-1", "1e999", "nan", "inf",
    "*", "(a+)+$", "(", "[", "\\", ".*.*.*.*.*.*.*.*x", "(?i)x", "a=1", "a=nan", "a#b", "C:\\x", "~", "$HOME", "5GB", "9" * 320 + "GB", "4300digits",
)  # fmt: skip
NUMBERS = (
    "0", "-0", "1", "-1", "2", "3", "7", "8", "64", "255", "256", "65536", "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "0.0", "-0.0", "1.0", "0.5", "1e-320", "1e308", "-1e308", "1e309", "1e999", "1E2", "1e-999", "4.000000000000001", "9" * 40, "1" + "0" * 400, "9" * 4301, "NaN", "Infinity", "-Infinity",
)  # fmt: skip
SHAPES = (
    "null", "true", "false", "[]", "{}", "[[]]", "[null]", "[{}]", '{"":{}}', '{"a":1,"a":2}', "[0,0]", "[1,2,3]", '["a"]', '[["a",1]]', "[true]", "[-1]", "[1.5]",
    "[" * 60 + "]" * 60, "[" * 990 + "]" * 990, "[" * 100_000, '{"a":' * 300 + "1" + "}" * 300, "[" + "1," * 200 + "1]",
)  # fmt: skip
YAML_ONLY = (
    ".inf", "-.inf", ".nan", "0o17", "0x1F", "1_000", "1:30:00", "190:20:30.15", "2001-01-01", "2001-99-99", "2001-12-14t21:59:43.10-25:99", "!!int x", "!!int ''", "!!float x", "!!bool maybe", "!!timestamp x",
    "!!binary 'x'", "!!binary AAAA", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5", "!!null x", "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!<tag:x> y",
    "&a [*a]", "&a {a: *a}", "{? [a] : b}", "{? {a: b} : c}", "{<<: {a: 1}}", "{<<: [{a: 1}, {b: 2}]}", "{<<: 3}", "*nobody", "[&x [a,a,a,a,a,a,a,a,a,a], *x, *x]", "yes", "No", "~", "''", "=", "<<", "0b", "0b_", "0x", "0x_", "+", "-", "._", "1__", ":",
    "[&a [l,l,l,l,l,l,l,l,l], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], &g [*f,*f,*f,*f,*f,*f,*f,*f,*f], [*g,*g,*g,*g,*g,*g,*g,*g,*g]]",
    "{a: &a {k0: v}, b: &b {<<: [*a,*a,*a,*a,*a,*a,*a,*a]}, c: &c {<<: [*b,*b,*b,*b,*b,*b,*b,*b]}, d: &d {<<: [*c,*c,*c,*c,*c,*c,*c,*c]}, e: &e {<<: [*d,*d,*d,*d,*d,*d,*d,*d]}, f: &f {<<: [*e,*e,*e,*e,*e,*e,*e,*e]}, g: {<<: [*f,*f,*f,*f,*f,*f,*f,*f]}}",
)  # fmt: skip
BYTES = (0, 1, 0x20, 0x22, 0x2C, 0x3A, 0x5B, 0x5C, 0x7B, 0x7D, 0x7F, 0x80, 0xC0, 0xED, 0xF4, 0xFE, 0xFF)


def parse(text: str) -> Any:
    """The tree of a JSON text. Raises ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([key, value] for key, value in pairs), parse_int=Raw, parse_float=Raw, parse_constant=Raw)


def tree(value: Any) -> Any:
    """The tree of a Python value made of dicts, lists, strings and numbers."""
    return parse(json.dumps(value))


def spell(node: Any) -> str:
    """The document of a tree. Strings are escaped as JSON does it, lone surrogates too."""
    if type(node) is str:
        return encode_basestring_ascii(node)
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{spell(key)}:{spell(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(spell, node)) + "]"
    return json.dumps(node)


def _slots(root: list[Any]) -> list[tuple[list[Any], int]]:
    """The places in a tree that hold a value, the first `MAX_NODES` of them: (its list, its index). A generator in a generator would take most of an input's time."""
    found, open_nodes = [], [root]
    while open_nodes and len(found) < MAX_NODES:
        node = open_nodes.pop()
        places = [(pair, 1) for pair in node] if type(node) is Pairs else [(node, index) for index in range(len(node))]
        found += places
        open_nodes += [holder[index] for holder, index in places if isinstance(holder[index], list)]
    return found[:MAX_NODES]


def atom(random: Random, words: Sequence[str], yaml: bool = False) -> Any:
    """A value that a reader may not expect."""
    kind = random.randrange(6 if yaml else 5)
    if kind == 0:
        return random.choice(STRINGS)
    if kind == 1:
        return Raw(random.choice(NUMBERS))
    if kind == 2:
        return Raw(random.choice(SHAPES))
    if kind == 3 and words:
        return random.choice(words)
    return Raw(random.choice(YAML_ONLY)) if yaml and kind == 5 else Raw(str(random.randrange(-3, 70)))


def bend(root: list[Any], random: Random, words: Sequence[str], yaml: bool = False) -> None:
    """Change a tree in one to four places. ``words``: keys and values that its reader knows."""
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        slots = _slots(root)
        holder, index = random.choice(slots)
        node = holder[index]
        action = random.randrange(10)
        if action < 3:
            holder[index] = atom(random, words, yaml)
        elif action == 3:
            other, place = random.choice(slots)
            holder[index] = other[place] if not _holds(other[place], holder) else None
        elif action == 4:
            holder[index] = random.choice((lambda: [node], lambda: Pairs([[random.choice(words or ("",)), node]]), lambda: [node, node], lambda: str(node)[:200]))()
        elif isinstance(node, Pairs) and node:
            _bend_object(node, random, words, yaml)
        elif isinstance(node, list) and node and action < 8:
            place = random.randrange(len(node))
            random.choice((lambda: node.pop(place), lambda: node.insert(place, atom(random, words, yaml)), lambda: node.extend(node[place : place + 1] * random.choice((1, 2, 60))), lambda: random.shuffle(node)))()
        elif isinstance(node, Raw) and node.lstrip("-").isdigit() and len(node) < 25:
            holder[index] = Raw(str(random.choice((int(node) + 1, int(node) - 1, -int(node), int(node) * 2, int(node) << 32, int(node) // 2))))
        elif isinstance(node, str) and not isinstance(node, Raw):
            cut = random.randrange(len(node) + 1)
            holder[index] = node[:cut] + random.choice(STRINGS) + node[cut:]


def _bend_object(node: Pairs, random: Random, words: Sequence[str], yaml: bool) -> None:
    pair = random.choice(node)
    action = random.randrange(5)
    if action == 0:
        node.remove(pair)
    elif action == 1:
        node.append([pair[0], atom(random, words, yaml)])
    elif action == 2:
        pair[0] = random.choice((*STRINGS, *words))
    elif action == 3:
        node.append([random.choice(words or ("a",)), atom(random, words, yaml)])
    else:
        random.shuffle(node)


def _holds(node: Any, wanted: Any) -> bool:
    return isinstance(node, list) and (node is wanted or any(_holds(item, wanted) for item in node))


def bend_text(text: str, random: Random, words: Sequence[str], yaml: bool = False) -> str | None:
    """A JSON text with its tree bent; None where it is not JSON, or nested too deeply."""
    try:
        root = [parse(text)]
        bend(root, random, words, yaml)
        return spell(root[0])
    except (ValueError, RecursionError):
        return None


def bend_bytes(data: bytes, random: Random, words: Sequence[str]) -> bytes:
    """Bytes changed in one to four places, with no idea of what they mean."""
    raw = bytearray(data)
    for _ in range(random.randrange(1, 5)):
        place, size = random.randrange(len(raw) + 1), random.choice((1, 1, 1, 2, 4, 8, 32))
        action = random.randrange(7)
        if action == 0 and place < len(raw):
            raw[place] ^= 1 << random.randrange(8)
        elif action == 1 and place < len(raw):
            raw[place] = random.choice(BYTES)
        elif action == 2:
            raw[place:place] = bytes(random.choice(BYTES) for _ in range(size))
        elif action == 3:
            del raw[place : place + size]
        elif action == 4:
            start = random.randrange(len(raw) + 1)
            raw[place:place] = raw[start : start + size]
        elif action == 5 and words:
            raw[place:place] = random.choice(words).encode("utf-8", "surrogatepass")
        elif action == 6:
            raw[place : place + size] = random.choice((*NUMBERS[:24], *STRINGS[:12])).encode("utf-8", "surrogatepass")
    return bytes(raw)
