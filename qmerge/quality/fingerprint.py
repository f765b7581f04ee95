"""Under which protocol was this measured? Results whose fingerprints differ are never compared."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from qmerge.store.texts import Document
from qmerge.store.windows import TokenDoc, Windows, text_fingerprint

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "optimum", "compressed-tensors", "lm-eval")


def protocol(model: torch.nn.Module, tokenizer: Any, device: str | torch.device, options: dict[str, Any]) -> dict[str, Any]:
    """What holds for all texts. ``options`` are the evaluation's own choices (window length, tail, template, what was merged on)."""
    kind = torch.device(device).type
    return {
        "windows": "documents in file order, BOS and EOS per document where the tokenizer defines them, cut into consecutive windows",
        "scored": "every token but the first of each window, BOS, and what the rows' loss mask leaves out",
        "log_softmax": "float32",
        "arithmetic": "fp32 on cpu" if kind == "cpu" else f"fp16 on {kind}, logits to fp32",
        "weights": "dequantized in fp32 from what the public loader holds",
        "attention": getattr(model.config, "_attn_implementation", None),
        "vocabulary": len(tokenizer),
        "clusters": "documents where every window holds one document, else windows; 95 % t intervals",
        "versions": versions(),
        **options,
    }


def text_protocol(docs: list[Document], token_docs: list[TokenDoc], windows: Windows, tokenizer: Any) -> dict[str, Any]:
    """One text's part: digests of text and token ids, and what was cut from them."""
    return text_fingerprint(docs, token_docs, tokenizer) | {
        "window_tokens": windows.tokens,
        "windows": len(windows),
        "dropped_tokens": windows.dropped_tokens,
        "scored_tokens": sum(int(mask[1:].sum()) for mask in windows.scored),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that can move a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
