"""Which characters of a name from outside may be shown, in a terminal and in Markdown?

HTML needs no function here: the template escapes by itself, after ``clean``.
"""

from __future__ import annotations

import re
import unicodedata

ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]|\x9b[0-?]*[ -/]*[@-~]")
ABSOLUTE = re.compile(r"^(?:/|~|[A-Za-z]:[\\/]|\\\\|file:)")
# Letters, digits and the marks that mean nothing to Markdown in the middle of a line; everything else becomes a numeric entity.
PLAIN = re.compile(r"[A-Za-z0-9 .,;:'\"%=/?()+^_-]")


def clean(text: object, limit: int = 160) -> str:
    """One line without escape sequences, control, bidirectional or invisible characters, at most ``limit`` long (cut in the middle)."""
    line = ANSI.sub("", str(text)[: 8 * limit])
    kept = []
    for char in line:
        category = unicodedata.category(char)
        if char in "\t\n\r\v\f" or category in ("Zl", "Zp"):
            kept.append(" ")
        elif not category.startswith("C"):
            kept.append(char)
    short = " ".join("".join(kept).split())
    if len(short) <= limit:
        return short
    head = (limit - 1) * 2 // 3
    return short[:head] + "…" + short[len(short) - (limit - 1 - head) :]


def show_path(path: object) -> str:
    """A path for a report: relative ones as they are, absolute ones by their last name, since a report must not tell where a machine keeps files."""
    text = clean(path)
    if ABSOLUTE.match(text):
        return "…/" + re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return text


def markdown_text(text: object, limit: int = 160) -> str:
    """``text`` as inert Markdown: nothing in it formats, links, mentions, starts a cell, a list or an element. Ordinary names stay readable."""
    source = clean(text, limit)
    parts = []
    for index, char in enumerate(source):
        before, after = source[index - 1 : index], source[index + 1 : index + 2]
        plain = ord(char) > 127 or bool(PLAIN.match(char))
        if char == "_":
            plain = before.isalnum() and after.isalnum()
        elif char == ":" and after == "/":
            plain = False  # bare addresses become links on GitHub
        elif index == 0 and char in "-+=":
            plain = False  # would start a list or a heading rule
        parts.append(char if plain else f"&#{ord(char)};")
    inert = re.sub(r"(?i)\bwww\.", lambda found: found[0][:3] + "&#46;", "".join(parts))
    return re.sub(r"^(\d+)([.)])(?= |$)", lambda found: f"{found[1]}&#{ord(found[2])};", inert)
