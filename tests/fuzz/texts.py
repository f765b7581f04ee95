"""Does the reader of texts answer for any rows, and can what it accepts be tokenized, packed and fingerprinted?

The first byte of an input says what the rest is: ``L`` .jsonl, ``J`` .json, ``T`` .txt, ``F`` .jsonl read with a template, ``C`` .jsonl with chats that are
written out. These fork a process, which takes as long as fifty other inputs: one changed input in eight stays one.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from transformers import AutoTokenizer

from fuzz import bending
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.store.texts import read_documents
from qmerge.store.windows import pack_windows, text_fingerprint, tokenize_documents

WORDS = ("messages", "role", "content", "user", "assistant", "system", "prompt", "completion", "text", "name", "\n", "\\ud800", "\\u0000", "<|im_end|>", "</s>", "{{", "}}")
MAX_LEN = 5000
TEMPLATE = "Q: {prompt}\n{text}"
_FOLDER = folder("texts")
_SUFFIXES = {b"J": "json", b"T": "txt"}
_TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "demo" / "base-nf4")


def seeds() -> Seeds:
    rows = [{"text": "one text"}, {"prompt": "a", "completion": "b"}, {"text": "éé"}, {"text": ""}]
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    several = (b"L" + "\n".join(map(json.dumps, rows)).encode(), b"J" + json.dumps(rows).encode(), b"Tplain text\n\nmore", b"F" + json.dumps({"prompt": 5, "text": "x"}).encode(), b"C" + json.dumps(chat).encode())
    return Seeds((*(b"L" + json.dumps(row).encode() for row in rows[:3]), *several), (b"L" + json.dumps(rows[3]).encode(), b"L" + json.dumps(chat).encode(), b"C" + json.dumps(chat | {"messages": 5}).encode(), b"L", b"J[]", b'L{"text":' + b"9" * 4301 + b"}"))


def check(data: bytes) -> bool:
    kind = data[:1]
    file = _FOLDER / f"rows.{_SUFFIXES.get(kind, 'jsonl')}"
    file.write_bytes(data[1:])
    try:
        documents = read_documents(file, TEMPLATE if kind == b"F" else None, _TOKENIZER if kind == b"C" else None)
        tokens = tokenize_documents(documents, _TOKENIZER)
        windows = pack_windows(tokens, 8, keep_tail=True)
    except QmergeError as error:
        return refused(error)
    text_fingerprint(documents, tokens, _TOKENIZER)
    if any(len(part) != len(ids) for ids, scored, doc in zip(windows.ids, windows.scored, windows.doc, strict=True) for part in (scored, doc)):
        raise Broken("windows of unequal parts")
    return True


def mutate(data: bytes, random: Random) -> bytes:
    if data.startswith(b"C") and random.random() < 0.875:
        data = b"L" + data[1:]
    lines = data[1:].split(b"\n")
    which = random.randrange(len(lines))
    text = bending.bend_text(lines[which].decode("utf-8", "replace"), random, WORDS)
    if text is None or random.random() < 0.1:
        return bending.bend_bytes(data, random, WORDS)
    lines[which] = text.encode("utf-8", "surrogatepass")
    return data[:1] + b"\n".join(lines)
