"""On which text does `qmerge run` calibrate, and on which does it measure?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmerge.cli.output import warn
from qmerge.errors import Refused
from qmerge.ranks import Ranks

if TYPE_CHECKING:
    from qmerge.store.texts import Document


def apart(calibration: Sequence[Document], kept: list[Document]) -> list[Document]:
    """The held-out documents that share no 13 words in a row with the calibration text. All of them where that would leave less than half: such text has a
    template or copies, what is left would be a choice of the unusual, and the overlap is to be refused."""
    from qmerge.store.overlap import overlapping

    shared = set(overlapping([one.text for one in calibration], [one.text for one in kept]))
    if not shared or 2 * len(shared) > len(kept):
        return kept
    warn(f"{len(shared)} of the {len(kept)} held-out documents share 13 words in a row with the calibration text, and are not measured on")
    return [one for index, one in enumerate(kept) if index not in shared]


def prepare_texts(found: Any, texts: dict[str, str], allow_overlap: bool, requests: Iterable[Any] = ()) -> tuple[Any, list[Document]]:
    """(calibration or None where the format needs none, documents held out for evaluation where no text was given). Refuses overlap before any work,
    also with the texts of ``requests``, the perplexities, and those that fill no window."""
    from qmerge.pipeline.calibrate import hold_out, load_tokenizer
    from qmerge.pipeline.run import calibration_for
    from qmerge.quality.evaluate import check_overlap
    from qmerge.store.texts import read_documents

    recipe = found.recipe
    tokenizer = load_tokenizer([*(adapter.path for adapter in found.adapters), found.checkpoint.path])
    evaluated = [document for path in texts.values() for document in read_documents(path, template=recipe.template, tokenizer=tokenizer)]
    others = [document for request in requests for document in _checked(request, tokenizer, found.context_length)]
    if not texts and recipe.calibration is None:
        raise Refused("there is no text to measure on", where="--text", expected="held-out text", found="none", fix="--text FILE, or qmerge merge to write without measuring")
    documents: list[Document] | None = None
    kept: list[Document] = []
    if not texts:
        documents, kept = hold_out(read_documents(recipe.calibration, template=recipe.template, tokenizer=tokenizer), recipe.seed)
        warn(f"no --text: {len(kept)} of the {len(kept) + len(documents)} calibration documents are held out to measure on")
    calibration = calibration_for(found, documents)
    if calibration and kept and not allow_overlap:
        kept = apart(calibration.documents, kept)
    if calibration:
        shared = check_overlap(calibration.documents, (evaluated or kept) + others, allow=allow_overlap)
        if shared:
            warn(f"calibration and evaluation text share {len(shared)} run(s) of 13 words; the more, the more the figures flatter the merged model")
    return calibration, kept


def check_other_file(calibration: str | None, texts: dict[str, str]) -> None:
    """Only a part of the calibration text is drawn and compared; the file itself is never held-out text."""
    for name, path in texts.items():
        if calibration and Path(path).exists() and Path(calibration).exists() and Path(path).samefile(calibration):
            raise Refused("the text to measure on is the calibration text", where=f"--text {name}", expected="text that neither the adapter nor the merge has seen", found=Path(path).name,
                          fix="other text; or leave --text out, and a fifth of the calibration documents is held out")  # fmt: skip


def _checked(request: Any, tokenizer: Any, context: int | None) -> list[Document]:
    """The documents of a perplexity, once they are known to fill its windows."""
    from qmerge.quality.protocols import context_length, plan, read_request
    from qmerge.store.texts import Document

    texts = read_request(request)
    plan(request, texts, tokenizer, context or context_length(None, tokenizer))
    return [Document(text) for text in texts]


def tokens_about(texts: dict[str, str], held_out: list[Document]) -> int:
    """Of what is measured on, about: three bytes to a token."""
    files = [file for path in texts.values() if Path(path).exists() for file in ([Path(path)] if Path(path).is_file() else Path(path).rglob("*")) if file.is_file()]
    return (sum(file.stat().st_size for file in files) + sum(len(document.text) for document in held_out)) // 3


def write_held_out(folder: Path, documents: list[Document], ranks: Ranks) -> Path:
    path = folder / "held-out.jsonl"
    if not ranks.first:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": document.spans[0][0], "completion": document.spans[1][0]} if len(document.spans) == 2 else {"text": document.text}
        for document in documents
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
