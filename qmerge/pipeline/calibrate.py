"""Which text does the requantizer look at, and in which windows?

In-domain first (the adapter's own training distribution) plus a generic share, so that other text does not drift. Windows are drawn with a
seed, mixed, and every seventh is held out to choose with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from qmerge.errors import Refused
from qmerge.store.foreign import check_tokenizer_folder
from qmerge.store.texts import Document, read_documents
from qmerge.store.windows import Windows, pack_windows, tokenize_documents

HELD_OUT_EVERY = 7


@dataclass(frozen=True)
class Calibration:
    """Token ids of the windows to solve on and of those to choose with, each int64 ``[windows, T]``; ``documents`` are the texts that were
    drawn, ``facts`` go into the manifest."""

    train: torch.Tensor
    held_out: torch.Tensor
    documents: tuple[Document, ...]
    facts: dict[str, Any]


def load_tokenizer(folders: list[Any]) -> Any:
    """The first folder's tokenizer that transformers can load: the adapter's before the base's. Never remote code."""
    from transformers import AutoTokenizer

    problem: Exception | None = None
    for folder in folders:
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
            continue
        check_tokenizer_folder(folder)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as caught:  # transformers raises many kinds here; all mean "no tokenizer"
            problem = caught
    raise Refused("no tokenizer could be loaded", where=", ".join(folder.name for folder in folders), expected="tokenizer files in the base or the adapter",
                  found=str(problem).splitlines()[0][:200] if problem else "none", fix="copy tokenizer.json and tokenizer_config.json of the original model into the folder of the base")


def hold_out(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """(the rest, a fifth for evaluation), drawn with the seed, each in the original order. Raises `Refused` where there are fewer than 5."""
    if len(documents) < 5:
        raise Refused("there are too few calibration documents to hold some out for evaluation", expected="at least 5", found=f"{len(documents)}", fix="give evaluation text with --text")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = set(order[: len(documents) // 5])
    return [d for i, d in enumerate(documents) if i not in kept], [d for i, d in enumerate(documents) if i in kept]


def load_calibration(
    source: str, generic: str | None, tokenizer: Any, *, template: str | None, generic_share: float, samples: int, tokens: int, seed: int,
    documents: list[Document] | None = None,
) -> Calibration:
    """Draw ``samples`` windows of ``tokens``; ``generic_share`` of them from ``generic`` where it is given. ``documents``: what of ``source`` to use.

    Fewer windows than asked for are used with a word about it in ``facts``; fewer than two are refused.
    """
    generic_wanted = round(samples * generic_share) if generic else 0
    documents = documents if documents is not None else read_documents(source, template=template, tokenizer=tokenizer)
    own, used, facts = _windows(documents, tokenizer, samples - generic_wanted, tokens, seed, source)
    chosen = list(own)
    all_facts: dict[str, Any] = {"in_domain": facts}
    if generic and generic_wanted:
        others = read_documents(generic, template=template if template and _fits(generic, template) else None, tokenizer=tokenizer)
        extra, used_too, all_facts["generic"] = _windows(others, tokenizer, generic_wanted, tokens, seed + 1, generic)
        used, chosen = used + used_too, chosen + extra
    if len(chosen) < 2:
        raise Refused("there is too little calibration text", where=source, expected=f"at least two windows of {tokens} tokens", found=f"{len(chosen)}", fix="give more text or smaller --tokens")
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [chosen[index] for index in order]
    held = [window for index, window in enumerate(mixed) if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] or mixed[-1:]
    train = [window for index, window in enumerate(mixed) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    train = train if len(mixed) >= HELD_OUT_EVERY else mixed[:-1]
    digest = hashlib.sha256(torch.stack(mixed).numpy().tobytes()).hexdigest()
    all_facts |= {"windows": len(train), "held_out_windows": len(held), "tokens_per_window": tokens, "token_ids_sha256": digest, "seed": seed}
    return Calibration(torch.stack(train), torch.stack(held), tuple(used), all_facts)


def _fits(path: str, template: str) -> bool:
    """A template is for the in-domain rows; generic text in plain rows or .txt is read as it is."""
    return not path.endswith(".txt") and "{text}" in template


def _windows(documents: list[Document], tokenizer: Any, wanted: int, tokens: int, seed: int, source: str) -> tuple[list[torch.Tensor], list[Document], dict[str, Any]]:
    """Windows, the documents they come from, and facts: documents in a seeded order, packed; only whole windows, and only as many documents as are needed."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    taken, count = [], 0
    for index in order:
        encoded = tokenize_documents([documents[index]], tokenizer)
        taken += encoded
        count += int(encoded[0].ids.numel())
        if count >= wanted * tokens + len(taken):
            break
    packed: Windows = pack_windows(taken, tokens, keep_tail=False)
    windows = [window for window in packed.ids if window.numel() == tokens][:wanted]
    if not windows:
        raise Refused("the calibration text is shorter than one window", where=source, expected=f"at least {tokens} tokens", found=f"{count} tokens",
                      fix=f"give more text, or --tokens {max(count // 2, 2)}")
    return windows, [documents[index] for index in order[: len(taken)]], {"source": _public_name(source), "documents": len(taken), "windows": len(windows), "wanted_windows": wanted}


def _public_name(source: str) -> str:
    """A file's own name; folders above it are nobody else's business."""
    return source.rstrip("/").rsplit("/", 1)[-1] if "/" in source and (source.startswith(("/", ".", "~")) or source.count("/") > 1) else source
