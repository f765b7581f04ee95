"""Which files beside the weights does a server need, and from which input do they come?

An allow-list: tokenizer, chat templates, generation and processor configs, licences, byte for byte. Never code: a config that names some is written without. The tokenizer is one set and
comes whole from one folder: the adapter's when it has one (fine-tuning may have added tokens), else the base's.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qmerge.store.durable import room_needed, sync, write_json
from qmerge.store.inert import without_code
from qmerge.store.jsonfiles import MAX_JSON_BYTES, read_object
from qmerge.store.regular import check_contained, open_plain, read_plain

# a folder with one of these can tokenize; the rest of the set is meaningless without it
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken")
TOKENIZER = (
    *VOCABULARIES, "tokenizer*.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
CONFIGS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_CODE = (".py", ".pyc", ".so", ".sh")


def copy_side_files(base: Path, adapter: Path, out: Path) -> list[str]:
    """Copy what the allow-list finds into ``out``; returns the relative names, sorted. Files get umask modes and are never links.

    A config comes from the adapter where it has one, else from the base. Licences come from both; where they differ under one name,
    the adapter's is ``<name>.adapter``. Raises Refused for a link that leaves its folder (a hub snapshot's links to its own blobs are
    fine) and for a config that is no JSON object, FileExistsError when ``out`` already has such a file.
    """
    plan = side_files(base, adapter)
    for target, (folder, name) in plan.items():
        _copy(folder / name, Path(out) / target)
    return sorted(plan)


def side_files(base: Path, adapter: Path) -> dict[str, tuple[Path, str]]:
    """Name in the output -> (folder, name there) of every file that `copy_side_files` copies. Raises Refused as that does."""
    base, adapter = Path(base), Path(adapter)
    tokenizer = adapter if matching(adapter, VOCABULARIES) else base
    plan = {name: (tokenizer, name) for name in matching(tokenizer, TOKENIZER)}
    for folder in (base, adapter):
        plan |= {name: (folder, name) for name in matching(folder, CONFIGS)}
    plan |= {name: (base, name) for name in matching(base, LICENCES)}
    for name in matching(adapter, LICENCES):
        same = name not in plan or filecmp.cmp(base / name, adapter / name, shallow=False)
        plan[name if same else f"{name}.adapter"] = (adapter, name)
    for folder, name in plan.values():
        check_contained(folder, name, "it is not copied into the output")
    return plan


def is_side_file(name: str) -> bool:
    """May `copy_side_files` have written a file of this name?"""
    name = name.removesuffix(".adapter") if fnmatchcase(name, "[LNU]*.adapter") else name
    return not name.lower().endswith(_CODE) and any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in (*TOKENIZER, *CONFIGS, *LICENCES))


def matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Relative names of files in ``folder`` (and in additional_chat_templates) that match one of ``patterns``, sorted."""
    candidates = [path for inside in (folder, folder / "additional_chat_templates") if inside.is_dir() for path in inside.iterdir()]
    names = [path.relative_to(folder).as_posix() for path in candidates if path.is_file() and path.suffix.lower() not in _CODE]
    return sorted(name for name in names if any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns))


def _copy(source: Path, target: Path) -> None:
    if (told := _without_code(source)) is not None:
        write_json(target, told)
        return
    with room_needed(target.name):
        target.parent.mkdir(exist_ok=True)
        with open_plain(source) as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
    sync(target)


def _without_code(source: Path) -> dict[str, Any] | None:
    """The content of a config that names code or a folder of somebody's machine, without it; None for every other file, which is copied as it is."""
    if source.name not in (*CONFIGS, "tokenizer_config.json"):
        return None
    with contextlib.suppress(ValueError, RecursionError):  # no JSON: no loader reads it either
        json.loads(read_plain(source, MAX_JSON_BYTES))
        content = read_object(source, what="a config beside the model")
        cleaned = without_code(content)
        return cleaned if cleaned != content else None
    return None
