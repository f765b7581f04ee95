"""Does a candidate's own tokenizer read the evaluation's text as the reference's does?

All arms are measured on the same token ids, so a candidate whose tokens were renumbered, or whose chat template was lost, would look as good as it is not: its users
tokenize with the files in its folder. What changes the text that is measured is refused; what does not is said. Judged by what the tokenizers do, not by the bytes of
their files, which every library writes a little differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qmerge.errors import Refused
from qmerge.store.foreign import check_tokenizer_folder
from qmerge.store.sidefiles import TOKENIZER, VOCABULARIES
from qmerge.store.texts import Document, read_documents
from qmerge.store.windows import TokenDoc, tokenize_documents

SHOWN = 3
OTHER_MARKS = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def check_tokenizers(candidates: Mapping[str, str], reference: Any, texts: Mapping[str, str], **reading: Any) -> dict[str, str]:
    """Candidate name -> a note, where there is something to say. ``reading``: ``template`` and ``doc_separator``, as the texts are read.

    Raises Refused where a candidate gives a token another number or lacks it, has another BOS or EOS, or makes other ids of one of ``texts`` (its chat template in between).
    """
    folders = {name: folder for name, path in candidates.items() if (folder := Path(path)).is_dir()}
    notes = {name: "its folder has no tokenizer; it is measured with the reference's" for name, folder in folders.items() if not _has(folder, VOCABULARIES)}
    own = {name: _load(name, folder) for name, folder in folders.items() if name not in notes}
    wanted: dict[str, tuple[list[Document], list[TokenDoc]]] = {}
    for name, tokenizer in own.items():
        _check_vocabulary(name, tokenizer, reference)
        _check_ends(name, tokenizer, reference)
        for text, path in texts.items():
            if text not in wanted:
                docs = read_documents(path, tokenizer=reference, **reading)
                wanted[text] = docs, tokenize_documents(docs, reference)
            _check_text(name, tokenizer, text, path, wanted[text], reading)
        if said := _differences(tokenizer, reference):
            notes[name] = f"its tokenizer differs from the reference's, not in what it makes of these texts: {', '.join(said)}"
    return notes


def _has(folder: Path, patterns: Sequence[str]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _load(name: str, folder: Path) -> Any:
    check_tokenizer_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as problem:  # transformers raises many kinds here; all mean that its users have no tokenizer
        raise Refused("the candidate's tokenizer cannot be loaded", where=name, expected=f"what {TOKENIZER[0]} and the files beside it describe",
                      found=(str(problem).splitlines() or [type(problem).__name__])[0][:300], fix="copy the reference's tokenizer files into the candidate") from problem


def _check_vocabulary(name: str, own: Any, reference: Any) -> None:
    """Tokens that only the candidate has (a padding token that a tool added) change nothing that is measured, and are left to the note."""
    mine, theirs = own.get_vocab(), reference.get_vocab()
    moved = sorted((number, token) for token, number in theirs.items() if mine.get(token) != number)
    if not moved:
        return
    few = moved[:SHOWN]
    more = f" and {len(moved) - SHOWN} more" if len(moved) > SHOWN else ""
    raise Refused(
        "the candidate's tokenizer numbers tokens otherwise than the one that the reference uses", where=f"{name}: its tokenizer's vocabulary",
        expected=", ".join(f"{token!r} = {number}" for number, token in few) + more,
        found=", ".join(f"{token!r} = {mine.get(token, 'absent')}" for _, token in few) + more, fix="copy the reference's tokenizer files into the candidate, or merge again",
    )


def _check_ends(name: str, own: Any, reference: Any) -> None:
    for mark in ("bos_token", "eos_token"):
        if (found := getattr(own, mark)) != (wanted := getattr(reference, mark)):
            raise Refused(f"the candidate's tokenizer has another {mark} than the one that the reference uses", where=f"{name}: its tokenizer's config", expected=repr(wanted), found=repr(found),
                          fix="copy the reference's tokenizer files into the candidate, or merge again")


def _check_text(name: str, own: Any, text: str, path: str, wanted: tuple[list[Document], list[TokenDoc]], reading: dict[str, Any]) -> None:
    fix = "copy the reference's tokenizer files and chat template into the candidate, or merge again"
    try:
        docs = read_documents(path, tokenizer=own, **reading)
    except Refused as problem:
        raise Refused("the candidate's chat template is lost or cannot write this text, which the reference's can", where=f"{name} on {text}", found=problem.what, fix=fix) from problem
    for index, (written, wished) in enumerate(zip_longest((doc.text for doc in docs), (doc.text for doc in wanted[0]), fillvalue="")):
        if written != wished:
            raise Refused("the candidate's chat template writes other text than the one that the reference uses", where=f"{name} on {text}, document {index + 1}",
                          expected=repr(_around(wished, written)), found=repr(_around(written, wished)), fix=fix)
    for index, (mine, theirs) in enumerate(zip(tokenize_documents(docs, own), wanted[1], strict=True)):
        if not torch.equal(mine.ids, theirs.ids):
            raise Refused("the candidate's tokenizer makes other tokens of the text than the one that the reference uses", where=f"{name} on {text}, document {index + 1}",
                          expected=f"{len(theirs.ids)} tokens", found=_first_difference(mine.ids, theirs.ids), fix=fix)


def _around(text: str, other: str) -> str:
    """The part of ``text`` where it begins to differ from ``other``."""
    start = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return text[max(0, start - 10) : start + 30]


def _first_difference(mine: torch.Tensor, theirs: torch.Tensor) -> str:
    least = min(len(mine), len(theirs))
    unequal = (mine[:least] != theirs[:least]).nonzero()
    return f"{len(mine)} tokens, the first other one at {int(unequal[0]) if len(unequal) else least}"


def _differences(own: Any, reference: Any) -> list[str]:
    said = []
    if extra := len(set(own.get_vocab()) - set(reference.get_vocab())):
        said.append(f"{extra} more tokens")
    said += [f"another {mark}" for mark in OTHER_MARKS if getattr(own, mark) != getattr(reference, mark)]
    if _template(own) != _template(reference):
        said.append("another chat template" if own.chat_template else "no chat template")
    return said


def _template(tokenizer: Any) -> Any:
    """jinja drops one line end at the end of a template, so it does not count."""
    return tokenizer.chat_template.rstrip("\n") if isinstance(tokenizer.chat_template, str) else tokenizer.chat_template
