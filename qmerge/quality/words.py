"""What of another library's words may stand in a file that people publish?"""

from __future__ import annotations

import re


def public(text: str) -> str:
    """``text`` with folders cut off paths, and control characters off: ``public("no /home/me/x.bin") == "no x.bin"``."""
    return re.sub(r"(?<![\w:/.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\":,;()\[\]]+)*[/\\](?=[^\s/\\])", "", "".join(char if char.isprintable() else " " for char in text))
