"""Which files beside the weights does a server need, and from which input do they come?

An allow-list: tokenizer, chat templates, generation and processor configs, licences. Never code. The tokenizer is one set and
comes whole from one folder: the adapter's when it has one (fine-tuning may have added tokens), else the base's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from qmerge.errors import Refused
from qmerge.store.durable import room_needed, sync
from qmerge.store.hub import in_hub_cache

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
    the adapter's is ``<name>.adapter``. Raises Refused for a link that leaves its folder (a hub snapshot's links into its own cache are
    fine), FileExistsError when ``out`` already has such a file.
    """
    plan = side_files(base, adapter)
    for target, (folder, name) in plan.items():
        _copy(folder / name, Path(out) / target)
    return sorted(plan)


def side_files(base: Path, adapter: Path) -> dict[str, tuple[Path, str]]:
    """Name in the output -> (folder, name there) of every file that `copy_side_files` copies. Raises Refused as that does."""
    base, adapter = Path(base), Path(adapter)
    tokenizer = adapter if _matching(adapter, VOCABULARIES) else base
    plan = {name: (tokenizer, name) for name in _matching(tokenizer, TOKENIZER)}
    for folder in (base, adapter):
        plan |= {name: (folder, name) for name in _matching(folder, CONFIGS)}
    plan |= {name: (base, name) for name in _matching(base, LICENCES)}
    for name in _matching(adapter, LICENCES):
        same = name not in plan or (base / name).read_bytes() == (adapter / name).read_bytes()
        plan[name if same else f"{name}.adapter"] = (adapter, name)
    for source in plan.values():
        _check_contained(*source)
    return plan


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Relative names of files in ``folder`` (and in additional_chat_templates) that match one of ``patterns``, sorted."""
    candidates = [path for inside in (folder, folder / "additional_chat_templates") if inside.is_dir() for path in inside.iterdir()]
    names = [path.relative_to(folder).as_posix() for path in candidates if path.is_file() and path.suffix.lower() not in _CODE]
    return sorted(name for name in names if any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns))


def _check_contained(folder: Path, name: str) -> None:
    home, target = folder.resolve(), (folder / name).resolve()
    if target.is_relative_to(home) or (in_hub_cache(home) and in_hub_cache(target)):
        return
    raise Refused("A file of an input is a link that leads out of its folder; it is not copied into the output.", where=name,
                  expected="a file inside the folder", found="a link", fix="replace the link by a copy of the file")


def _copy(source: Path, target: Path) -> None:
    with room_needed(target.name):
        target.parent.mkdir(exist_ok=True)
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
    sync(target)
