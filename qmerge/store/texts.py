"""Which documents does a file, a folder or a hub dataset hold, for calibration and evaluation alike?

Left out on purpose: tokens and windows (`windows.py`), shuffling, sampling and held-out shares (their owner is the caller, who has the seed). Nothing here imports torch.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def text_files(path: str) -> list[Path] | None:
    """The files that ``path`` names, sorted; None where only a hub dataset can be meant, and nobody is asked. Raises Refused for what can be neither, and for files of another kind."""
    here = Path(path)
    if here.is_dir():
        files = sorted(p for p in here.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise Refused("the folder holds no text files", where=path, expected=" ".join("*" + s for s in SUFFIXES), found="none")
        return files
    if here.is_file():
        if here.suffix.lower() not in SUFFIXES:
            raise Refused("the kind of this file is not known", where=path, expected=", ".join(SUFFIXES), found=here.suffix.lower() or "no suffix")
        return [here]
    _dataset(path)
    return None


def _documents(path: str, template: list[tuple[str, str | None]] | None, chats: ChatWriter, separator: str | None) -> Iterator[Document]:
    files = text_files(path)
    if files is None:
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


def _dataset(name: str) -> tuple[str, str | None, str | None]:
    """(repository, configuration, split) of a hub dataset's name."""
    parts = name.split(":")
    looks_local = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in SUFFIXES or parts[0].count("/") > 1 or len(parts) > 3
    if looks_local or not all(parts):
        raise Refused("no such file or folder", where=name, expected="a file, a folder, or a hub dataset as name[[:config]:split]", found="nothing there",
                      fix="check the spelling, and that the path is right from the folder that qmerge was started in")
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else None


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    repo, config, split = _dataset(name)
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
