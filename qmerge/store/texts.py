"""How does text become token windows, for calibration and evaluation alike?

Files are read into documents, documents get BOS and EOS where the tokenizer defines them, and the stream of all documents is
cut into windows of equal length. Left out on purpose: shuffling, sampling and held-out shares (their owner is the caller, who
has the seed), and padding (no window is ever padded: a window is all tokens, or it is the tail).
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmerge.errors import Refused, UsageProblem
from qmerge.store.templates import ChatWriter

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
ROW_SHAPES = "`messages`, `prompt` + `completion`, or `text` (or name the fields with --template '… {field} …')"


@dataclass(frozen=True)
class Document:
    """One text. ``spans`` are its parts in order with a flag each: does the loss look at this part? Empty: at all of it."""

    text: str
    spans: tuple[tuple[str, bool], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        return self.spans or ((self.text, True),)


@dataclass(frozen=True)
class TokenDoc:
    """``ids`` int64 ``[n]`` and ``scored`` bool ``[n]`` (True: this token counts as a target; BOS never does)."""

    ids: torch.Tensor
    scored: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of one token stream. Per window: ``ids`` int64 ``[T]``, ``scored`` bool ``[T]``, ``doc`` int64 ``[T]``
    (index of the document that the token came from). All windows hold ``tokens`` tokens; only the last may be shorter."""

    ids: tuple[torch.Tensor, ...]
    scored: tuple[torch.Tensor, ...]
    doc: tuple[torch.Tensor, ...]
    tokens: int
    dropped_tokens: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Overlap:
    """An n-gram that two sets of documents share, with the first document on each side that holds it."""

    ngram: str
    a_doc: int
    b_doc: int


def read_documents(
    path: str | Path,
    template: str | None = None,
    tokenizer: Any = None,
    *,
    doc_separator: str | None = None,
    limit: int | None = None,
    keep_empty: bool = False,
) -> list[Document]:
    """Documents of a file, of every such file in a folder (sorted by name), or of a hub dataset ``name[[:config]:split]``.

    ``.txt`` is one document, or several split at ``doc_separator``; rows of ``.json`` (a list), ``.jsonl`` and ``.parquet`` are
    ``messages`` (the tokenizer's chat template), ``prompt`` + ``completion`` (only the completion is scored), ``text``, or
    ``template`` with ``{field}`` names. Text is UTF-8; CRLF reads as LF. ``limit`` stops after so many documents. Rows without text are left out
    unless ``keep_empty`` (WikiText's are part of its text, where rows are joined).

    Raises ``Refused`` for what cannot be read, naming the file and the row, and ``UsageProblem`` for a malformed template.
    """
    parts = None if template is None else _template_parts(template)
    docs: list[Document] = []
    with ChatWriter(tokenizer) as chats:
        for doc in _documents(str(path), parts, chats, doc_separator):
            if doc.text or keep_empty:
                docs.append(doc)
            if limit is not None and len(docs) >= limit:
                break
    if not any(doc.text for doc in docs):
        raise Refused("no documents were found", where=str(path), expected="at least one document that is not empty", found="none", fix="is the file the right one? Rows need text: docs/inputs.md lists the shapes")
    return docs


def tokenize_documents(docs: Iterable[Document], tokenizer: Any) -> list[TokenDoc]:
    """Each document's tokens, with BOS before and EOS after when the tokenizer defines them, and never twice.

    A text that already brings its BOS or EOS (a chat template's, say, also with white space behind it) keeps its own.
    """
    return [_tokenize(doc, tokenizer) for doc in docs]


def pack_windows(token_docs: Sequence[TokenDoc], tokens: int, keep_tail: bool = False) -> Windows:
    """Concatenate the documents in order and cut windows of ``tokens``. The rest at the end stays if ``keep_tail``, or if it is all
    there is, and has at least 2 tokens (one to predict from, one to predict); otherwise ``dropped_tokens`` counts it.

    Where BOS and EOS are one token (GPT-2), a document's BOS after the previous one's EOS is not packed a second time.
    """
    if tokens < 2:
        raise UsageProblem("a window needs at least 2 tokens", expected=">= 2", found=tokens)
    ids, scored, doc, last = [], [], [], None
    for index, item in enumerate(token_docs):
        skip = int(len(item.ids) > 1 and last is not None and int(item.ids[0]) == last and not bool(item.scored[0]))
        ids.append(item.ids[skip:])
        scored.append(item.scored[skip:])
        doc.append(torch.full((len(item.ids) - skip,), index, dtype=torch.int64))
        last = int(item.ids[-1]) if len(item.ids) else last
    total = sum(len(part) for part in ids)
    if total < 2:
        raise Refused("the text is too short to predict anything", expected="at least 2 tokens", found=total, fix="give more text")
    cuts = [(start, min(start + tokens, total)) for start in range(0, total, tokens)]
    kept = [c for c in cuts if c[1] - c[0] == tokens or (c[1] - c[0] >= 2 and (keep_tail or len(cuts) == 1))]
    flat = [torch.cat(part) for part in (ids, scored, doc)]
    rows = [tuple(part[start:stop].clone() for start, stop in kept) for part in flat]
    return Windows(rows[0], rows[1], rows[2], tokens=tokens, dropped_tokens=total - sum(stop - start for start, stop in kept))


def ngram_overlap(a_docs: Sequence[str], b_docs: Sequence[str], n: int = 13) -> list[Overlap]:
    """The n-grams of lower-case words (split at white space) that both sides hold, in the order of ``b_docs``, each once.

    Texts of fewer than ``n`` words have no n-gram; they are compared whole.
    """
    seen: dict[int, int] = {}
    for index, text in enumerate(a_docs):
        for gram in _ngrams(text, n):
            seen.setdefault(hash(gram), index)
    found: dict[int, Overlap] = {}
    for index, text in enumerate(b_docs):
        for gram in _ngrams(text, n):
            key = hash(gram)
            if key in seen and key not in found:
                found[key] = Overlap(" ".join(gram), seen[key], index)
    return list(found.values())


def overlapping(a_docs: Sequence[str], b_docs: Sequence[str], n: int = 13) -> list[int]:
    """Which of ``b_docs`` hold an n-gram of ``a_docs``: all of them, where `ngram_overlap` names the first for each n-gram."""
    seen = {hash(gram) for text in a_docs for gram in _ngrams(text, n)}
    return [index for index, text in enumerate(b_docs) if any(hash(gram) in seen for gram in _ngrams(text, n))]


def text_fingerprint(docs: Sequence[Document], token_docs: Sequence[TokenDoc], tokenizer: Any) -> dict[str, Any]:
    """What must be equal for two measurements to be on the same text: sha256 of the documents (texts and scored spans) and of
    their token ids and masks, the counts, and whether BOS and EOS are added."""
    text, ids = hashlib.sha256(), hashlib.sha256()
    for doc in docs:
        text.update(json.dumps(doc.parts, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    for item in token_docs:
        ids.update(len(item.ids).to_bytes(8, "little"))
        ids.update(item.ids.to(torch.int64).numpy().tobytes())
        ids.update(item.scored.to(torch.uint8).numpy().tobytes())
    return {
        "text_sha256": text.hexdigest(),
        "token_ids_sha256": ids.hexdigest(),
        "documents": len(docs),
        "tokens": sum(len(item.ids) for item in token_docs),
        "bos": "per document" if tokenizer.bos_token_id is not None else "none (the tokenizer defines none)",
        "eos": "per document" if tokenizer.eos_token_id is not None else "none (the tokenizer defines none)",
    }


def _documents(path: str, template: list[tuple[str, str | None]] | None, chats: ChatWriter, separator: str | None) -> Iterator[Document]:
    here = Path(path)
    if here.is_dir():
        files = sorted(p for p in here.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise Refused("the folder holds no text files", where=path, expected=" ".join("*" + s for s in SUFFIXES), found="none")
    elif here.is_file():
        files = [here]
    else:
        yield from (_row_document(row, where, template, chats) for where, row in _hub_rows(path))
        return
    for file in files:
        if file.suffix.lower() == ".txt":
            text = _read_text(file)
            for part in text.split(separator) if separator else [text]:
                # With a separator the line breaks around it belong to it, not to the documents.
                yield Document(part.strip("\n") if separator else part)
        else:
            yield from (_row_document(row, where, template, chats) for where, row in _file_rows(file))


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("the file is not UTF-8 text", where=str(file), expected="UTF-8", found=f"byte {error.start}: {error.reason}", fix="iconv -f latin1 -t utf-8 FILE, if it is in Latin-1") from error
    except OSError as error:
        raise Refused("the file cannot be read", where=str(file), found=error.strerror, fix="see that it may be read (ls -l), then run the same command again") from error
    if not text.strip():
        raise Refused("the file is empty", where=str(file), expected="text", found=f"{file.stat().st_size} bytes without text")
    return text


def _file_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """``(where, row)`` of each row; ``where`` names file and row for messages."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet  # heavy, and only this branch needs it

        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except Exception as error:  # pyarrow has no one base class for what a broken file can raise
            raise Refused("the Parquet file cannot be read", where=str(file), found=str(error).splitlines()[0], fix="see that it is whole: download or write it again; JSONL and plain text are read too") from error
        yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows, 1))
        return
    if suffix not in SUFFIXES:
        raise Refused("the kind of this file is not known", where=str(file), expected=", ".join(SUFFIXES), found=suffix or "no suffix")
    text = _read_text(file)
    if suffix == ".json":
        rows = _parse(text, str(file))
        if not isinstance(rows, list):
            raise Refused("the file holds no list of rows", where=str(file), expected="a JSON list", found=type(rows).__name__, fix="one object per line? name it .jsonl")
        yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows, 1))
    else:  # only "\n" ends a row: splitlines() would also cut inside strings that hold U+2028
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{file}, line {number}", _parse(line, f"{file}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError of its own
        raise Refused("this is not JSON", where=where, expected="valid JSON", found=str(error)) from error


def _row_document(row: Any, where: str, template: list[tuple[str, str | None]] | None, chats: ChatWriter) -> Document:
    if not isinstance(row, dict):
        raise Refused("a row is not an object", where=where, expected="an object with " + ROW_SHAPES, found=type(row).__name__)
    if template is not None:
        return Document("".join(text + ("" if name is None else _field(row, name, where, any_type=True)) for text, name in template))
    if row.get("messages") is not None:
        return Document(_whole(chats.write(row["messages"], where), where))
    if "prompt" in row and "completion" in row:
        prompt, completion = _field(row, "prompt", where), _field(row, "completion", where)
        return Document(prompt + completion, ((prompt, False), (completion, True)))
    if "text" in row:
        return Document(_field(row, "text", where))
    raise Refused("a row has no text that qmerge knows", where=where, expected=ROW_SHAPES, found="fields: " + (", ".join(map(str, row)) or "none"), fix="--template 'Question: {question} Answer: {answer}' says how a row becomes text")


def _field(row: dict[str, Any], name: str, where: str, any_type: bool = False) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return _whole(value, where)
    if any_type and isinstance(value, (int, float, bool)):
        return str(value)
    found = type(value).__name__ if name in row else "fields: " + (", ".join(map(str, row)) or "none")
    raise Refused(f"field `{name}` of a row is {'not text' if name in row else 'missing'}", where=where, expected=f"`{name}` as text", found=found, fix="correct the row, or another --template")


def _template_parts(template: str) -> list[tuple[str, str | None]]:
    """``(literal, field or None)`` pieces. Fields are plain names: attributes, indices and conversions are not evaluated."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageProblem("the template is malformed", where=f"--template {template!r}", found=str(error), fix="write a literal brace twice") from error
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion or not set("[].").isdisjoint(name)):
            raise UsageProblem("a template may only name fields", where=f"--template {template!r}", expected="{field}", found="{" + name + "…}")
    if all(name is None for _, name, _, _ in parts):
        raise UsageProblem("the template names no field", where=f"--template {template!r}", expected="at least one {field}", fix="name the fields of a row, as in --template 'Question: {question} Answer: {answer}'")
    return [(text, name) for text, name, _, _ in parts]


def _whole(text: str, where: str) -> str:
    """``text``; Refused where it holds half a character, which JSON can spell and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused("a row holds half a character (a lone surrogate)", where=where, expected="text that can be written as UTF-8", found=f"{text[error.start]!r} at character {error.start}") from None
    return text


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    parts = name.split(":")
    looks_local = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in SUFFIXES or parts[0].count("/") > 1 or len(parts) > 3
    if looks_local or not all(parts):
        raise Refused("no such file or folder", where=name, expected="a file, a folder, or a hub dataset as name[[:config]:split]", found="nothing there",
                      fix="check the spelling, and that the path is right from the folder that qmerge was started in")
    repo, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else None
    try:
        import datasets

        rows = datasets.load_dataset(repo, config, split=split)
    except Exception as error:  # the network, the hub, a missing repository or split: each has its own tree of exceptions
        raise Refused(
            "there is no such file, and the hub gave no dataset of this name",
            where=name, expected="a file, a folder, or a hub dataset as name[[:config]:split]", found=f"{type(error).__name__}: {error}",
        ) from error
    if isinstance(rows, dict):
        if len(rows) != 1:
            raise Refused("the dataset has several splits", where=name, expected="one", found=", ".join(rows), fix=f"name it, as in {repo}:{next(iter(rows))}")
        rows = next(iter(rows.values()))
    yield from ((f"{name}, row {i}", row) for i, row in enumerate(rows, 1))


def _tokenize(doc: Document, tokenizer: Any) -> TokenDoc:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, scored = _encode(doc, tokenizer)
    if bos is not None:
        own = bool(ids) and ids[0] == bos
        ids, scored = [bos] + (ids[1:] if own else ids), [False] + (scored[1:] if own else scored)
    # "<|im_end|>\n": a template's own end of turn with white space behind it is an EOS too.
    if eos is not None and not (len(ids) > 1 and ids[-1] == eos) and not doc.text.rstrip().endswith(tokenizer.eos_token):
        ids, scored = ids + [eos], scored + [doc.parts[-1][1]]
    return TokenDoc(torch.tensor(ids, dtype=torch.int64), torch.tensor(scored, dtype=torch.bool))


def _encode(doc: Document, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids and mask without special tokens. A token that reaches into a scored part is scored: the joined text is tokenized as
    one, as in training, so a token may straddle the border."""
    options = {"add_special_tokens": False, "verbose": False}
    if len(doc.parts) == 1:
        ids = list(tokenizer(doc.text, **options)["input_ids"])
        return ids, [doc.parts[0][1]] * len(ids)
    if not getattr(tokenizer, "is_fast", False):  # no offsets: the parts are tokenized one by one
        pieces = [(list(tokenizer(text, **options)["input_ids"]), flag) for text, flag in doc.parts]
        return [i for ids, _ in pieces for i in ids], [flag for ids, flag in pieces for _ in ids]
    encoded = tokenizer(doc.text, return_offsets_mapping=True, **options)
    borders, end = [], 0
    for text, flag in doc.parts:
        borders.append((end, end + len(text), flag))
        end += len(text)
    masks = [any(flag and start < stop and b > start and a < stop for start, stop, flag in borders) for a, b in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), masks


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = text.lower().split()
    if words and len(words) < n:
        yield tuple(words)
    for start in range(len(words) - n + 1):
        yield tuple(words[start : start + n])
