"""How are chats written by a stranger's template, which is a program?

transformers renders it in jinja's sandbox, which keeps it from files and code and from nothing else: two loops, one in the other, take for ever, and ``'a' * 10**11`` takes all
memory. So on Linux it runs in a fork of this process that is ended when a chat takes too long and that has little memory to ask for. Elsewhere it runs here.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from types import TracebackType
from typing import Any

from qmerge.errors import Refused

LIMIT_S = 30.0
"""for one chat"""
SPARE_BYTES = 2 << 30
MOST_LETTERS = 50_000_000


class ChatWriter:
    """Writes chats with one tokenizer's template; the child is made for the first one and ends with the ``with`` block."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._child: Any = None
        self._line: Any = None

    def __enter__(self) -> ChatWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def write(self, messages: Any, where: str, **options: Any) -> str:
        """The text of one chat; ``options`` are those of ``apply_chat_template``. Raises Refused: no template, one that cannot write this chat, or that takes longer than `LIMIT_S` or more memory than there is for it."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise Refused("the rows hold `messages`, and the tokenizer has no chat template to write them with", where=where, expected="a tokenizer with a chat template", found="none",
                          fix="use `text` rows, or give --template")
        try:
            good, text = self._ask(messages, options) if sys.platform == "linux" else _written(self.tokenizer, messages, options)
        except EOFError:
            good, text = False, "its process was ended, as it asked for too much memory perhaps"
        if not good:
            self._end()
            raise Refused("the chat template cannot write this row", where=where, found=text, fix="--template TEXT writes rows without the chat template, or correct the row")
        return text

    def _ask(self, messages: Any, options: dict[str, Any]) -> tuple[bool, str]:
        if self._child is None:
            self._start()
        self._line.send((messages, options))
        if not self._line.poll(LIMIT_S):
            return False, f"nothing within {LIMIT_S:g} s: a loop without end, perhaps"
        good, text = self._line.recv()
        return good, text

    def _start(self) -> None:
        forking = multiprocessing.get_context("fork")
        self._line, other = forking.Pipe()
        self._child = forking.Process(target=_serve, args=(self.tokenizer, other, self._line), daemon=True)
        with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; this one touches none of what threads share
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child.start()
        other.close()

    def _end(self) -> None:
        if self._child is not None:
            self._line.close()
            self._child.kill()
            self._child.join()
            self._child = self._line = None


def _serve(tokenizer: Any, line: Any, other: Any) -> None:
    """The child: one answer per chat, until the other end is closed."""
    import resource

    other.close()
    os.closerange(0, 3)  # what it would say belongs to nobody's terminal
    with open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + SPARE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    while True:
        try:
            messages, options = line.recv()
        except EOFError:
            os._exit(0)
        line.send(_written(tokenizer, messages, options))


def _written(tokenizer: Any, messages: Any, options: dict[str, Any]) -> tuple[bool, str]:
    """``(True, text)`` or ``(False, why not)``: a template can raise anything."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        if not isinstance(text, str) or len(text) > MOST_LETTERS:
            return False, f"more than {MOST_LETTERS} letters" if isinstance(text, str) else f"a {type(text).__name__}"
        return True, text
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
