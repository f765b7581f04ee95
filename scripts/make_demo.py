"""Where does the committed demo come from? This trains it, from text that every Python installation carries: no download.

A small Llama learns the standard library's code (docstrings cut out), is quantized to NF4 by transformers + bitsandbytes, and gets a LoRA
on prose (the language reference's topics, docstrings). Written: the NF4 base, the adapter, four text files that share no 13 words in a row
with each other or with what was trained on, the licence of the text, and the measured figures. About ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import platform
import random
import re
import sys
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, WINDOW, BATCH, NGRAM = 2048, 512, 4, 13
BASE_LR, ADAPTER_LR, ADAPTER_STEPS = 2.5e-3, 6e-5, 150
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<s>assistant: {% endif %}"
# what no committed file may name; the standard library itself holds such paths in _sysconfigdata*.py and python-config.py
LOCAL = {f"{Path(p).resolve()}/" for p in (Path.home(), Path.cwd(), sys.prefix, sys.base_prefix)} - {"//", "/usr/", "/usr/local/"}
SKIP_DIRS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "lib2to3", "pydoc_data", "__pycache__"}
# characters to put aside per file, in the order they are drawn: evaluation first
HELD_OUT = {"eval-prose": ("prose", 70_000), "eval-code": ("code", 48_000), "calibration": ("prose", 140_000), "generic": ("code", 50_000)}


README = """# A small real QLoRA

Written by `scripts/make_demo.py` with the figures it measured (all of them: `demo.json`). `base-nf4/` is a Llama trained on code, of
{parameters:,} parameters, in NF4 with double quantization as transformers and bitsandbytes save it; `adapter/` is a LoRA on every linear
(rank 8, alpha 16), trained on prose on top of that base. Calibrate on `calibration.jsonl` (prose, {calibration_tokens:,} tokens) and
`generic.jsonl` (code, {generic_tokens:,}); measure on `eval-prose.jsonl` ({eval_prose_predicted_tokens:,} tokens to predict in
{eval_prose_documents} documents) and `eval-code.jsonl` ({eval_code_predicted_tokens:,} in {eval_code_documents}).

Text: the standard library of Python {python}, its sources without docstrings (code), the language reference's topics and longer docstrings
(prose); copyright Python Software Foundation and others, `LICENSE-PSF.txt`. Documents of the four files that shared 13 words in a row with
another of the four were dropped, and training text (tokenizer, base, adapter) that shared them with any of the four was too.

Training: base {steps} steps of {step_tokens} tokens, drawn from {train_code_tokens:,} tokens of code and no prose, {seconds_base:.0f} s;
adapter {adapter_steps} such steps, from {train_prose_tokens:,} tokens of prose, {seconds_adapter:.0f} s; {threads} threads, seed {seed}.

| perplexity, fp32 arithmetic | `eval-code.jsonl` | `eval-prose.jsonl` |
|---|---|---|
| token frequencies alone (unigram) | {code_ppl_unigram:.1f} | |
| float base | {code_ppl_float:.2f} | |
| NF4 base | {code_ppl_base:.2f} | {prose_ppl_base:.2f} |
| NF4 base with the adapter | {code_ppl_separate:.2f} | {prose_ppl_separate:.2f} |
| merged, rounded to the nearest NF4 values | {code_ppl_rtn:.2f} | {prose_ppl_rtn:.2f} |

The mean of ‖ΔW‖/‖W‖ over the linears is {delta_over_weight_mean:.2%}. On prose the adapter gains {prose_gain_nats:.4f} nats per token
(standard error by document {prose_gain_standard_error:.4f}); rounding the merged weights keeps {prose_share_of_gain_kept_by_rtn:.1%} of
that. KL per token to the model with its adapter: base {prose_kl_separate_to_base:.5f}, rounded {prose_kl_separate_to_rtn:.5f}.
"""


def chunks(text: str, low: int = 500, high: int = 2400) -> Iterator[str]:
    """Documents of ``low`` to ``high`` characters, cut between paragraphs; what is shorter or is one long paragraph is left out."""
    held = ""
    for part in [*re.split(r"\n\s*\n", text), ""]:
        if held and (not part or len(held) + len(part) > high):
            if low <= len(held) <= high:
                yield held
            held = ""
        held = f"{held}\n\n{part}" if held else part.strip("\n")


def split_source(source: str) -> tuple[str, str]:
    """A module as (code without docstrings, its longer docstrings that read as prose), so that the two domains share no text."""
    lines: list[str | None] = list(source.splitlines())
    prose: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        lines[first:last] = [None] * (last - first)
        text = ast.get_docstring(node)
        if len(text) >= 150 and ">>>" not in text and sum(c.isalpha() or c in " \n.," for c in text) > 0.9 * len(text):
            prose.append(text)
    return "\n".join(line for line in lines if line is not None), "\n\n".join(prose)


def read_sources() -> dict[str, list[list[str]]]:
    """The documents of each domain, grouped by where they come from (a module, a topic)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[list[str]]] = {"code": [], "prose": [list(chunks(topics[name])) for name in sorted(topics)]}
    for path in sorted(root.rglob("*.py")):
        if SKIP_DIRS & set(path.relative_to(root).parts):
            continue
        with tokenize.open(path) as handle:
            source = handle.read()
        if not any(mark in source for mark in LOCAL):
            for domain, text in zip(("code", "prose"), split_source(source), strict=True):
                found[domain].append(list(chunks(text)))
    return {domain: [group for group in groups if group] for domain, groups in found.items()}


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def split_texts(seed: int) -> dict[str, list[str]]:
    """The held-out files and the two training sets. A document that shares 13 words in a row with an earlier file is dropped."""
    groups, rng = read_sources(), random.Random(seed)
    for domain in groups.values():
        rng.shuffle(domain)
    out, seen = {}, set()
    for name, (domain, quota) in HELD_OUT.items():
        kept: list[str] = []
        while sum(map(len, kept)) < quota and groups[domain]:
            group = groups[domain].pop()  # two documents of it at most, and none of it in training: documents are nearly independent
            kept += [text for text in rng.sample(group, min(2, len(group))) if not ngrams(text) & seen]
        seen |= set().union(*map(ngrams, kept))
        out[name] = kept
    for domain, rest in groups.items():
        out[f"train-{domain}"] = [text for group in rest for text in group if not ngrams(text) & seen]
    return out


def find_licence() -> str:
    """The PSF licence as this installation carries it: without it the text may not be passed on."""
    for path in (Path(folder, "LICENSE.txt") for folder in (sysconfig.get_paths()["stdlib"], sys.base_prefix)):
        if path.is_file() and "PYTHON SOFTWARE FOUNDATION LICENSE" in (text := path.read_text(encoding="utf-8")):
            return text
    raise SystemExit(f"Python {platform.python_version()} has no LICENSE.txt beside its standard library: use an installation that has it")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without automatic BOS: qmerge puts BOS and EOS around each document itself."""
    raw, names = Tokenizer(models.BPE()), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=list(names.values()), initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=WINDOW, chat_template=CHAT, **names)


def train(model: torch.nn.Module, docs: list[torch.Tensor], steps: int, lr: float, seed: int) -> None:
    """AdamW with a cosine over random windows of the packed documents. bf16 autocast: 1.2 to 1.8 times as fast as fp32 on avx512_bf16."""
    stream, draw = torch.cat(docs), torch.Generator().manual_seed(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(20 * (step + 1) / steps, 0.525 + 0.475 * math.cos(math.pi * step / steps))
        batch = torch.stack([stream[i : i + WINDOW] for i in torch.randint(len(stream) - WINDOW, (BATCH,), generator=draw).tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.3f}", flush=True)


def new_base(**token_ids: int) -> LlamaForCausalLM:
    """Widths are multiples of 128, so that every group size divides them."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, head_dim=64, max_position_embeddings=WINDOW, tie_word_embeddings=True, **shape, **token_ids)
    return LlamaForCausalLM(config)


def save_nf4(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The bf16 model through transformers' own 4-bit loader; the float weights are not kept."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    with tempfile.TemporaryDirectory() as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        quantized = AutoModelForCausalLM.from_pretrained(scratch, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
        quantized.generation_config.max_new_tokens = 64
        quantized.save_pretrained(out / "base-nf4")
    tokenizer.save_pretrained(out / "base-nf4")


def train_adapter(docs: list[torch.Tensor], steps: int, seed: int, out: Path) -> PeftModel:
    """A LoRA on every linear of the NF4 base, whose linears were made plain ones with the dequantized weights in fp32."""
    # On a CPU with AVX512-BF16, bitsandbytes repacks a Linear4bit in place at its first evaluation forward, and what is trained or merged
    # after that is wrong: so no Linear4bit ever runs here.
    base = AutoModelForCausalLM.from_pretrained(out / "base-nf4", device_map="cpu").dequantize().float()
    peft = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    train(peft, docs, steps, ADAPTER_LR, seed)
    peft.peft_config["default"].base_model_name_or_path = "base-nf4"
    peft.peft_config["default"].target_modules = LINEARS  # PEFT holds a set, whose order would change from run to run
    peft.save_pretrained(out / "adapter", save_embedding_layers=False)
    (out / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's card: a template with nothing filled in
    return peft


@torch.no_grad()
def log_probs(model: torch.nn.Module, docs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Next-token log-probabilities per document, ``[tokens - 1, vocab]``; long documents in windows that the positions allow."""
    windows = [[doc[i : i + WINDOW + 1] for i in range(0, len(doc) - 1, WINDOW)] for doc in docs]
    return [torch.cat([model(input_ids=w[None, :-1], use_cache=False).logits[0].float().log_softmax(-1) for w in doc]) for doc in windows]


def doc_nll(probs: list[torch.Tensor], docs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([-p.gather(1, doc[1:, None]).sum() for p, doc in zip(probs, docs, strict=True)]).double()


def measure_code(model: torch.nn.Module, training: list[torch.Tensor], docs: list[torch.Tensor]) -> dict[str, float]:
    """Did the base learn more than how often each token occurs?"""
    counts = torch.bincount(torch.cat(training), minlength=VOCAB).double() + 1
    unigram = -(counts / counts.sum()).log()[torch.cat([doc[1:] for doc in docs])].mean().item()
    nll = doc_nll(log_probs(model, docs), docs).sum().item() / sum(len(doc) - 1 for doc in docs)
    return {"code_ppl_unigram": math.exp(unigram), "code_ppl_float": math.exp(nll)}


@torch.no_grad()
def compare(peft: PeftModel, evaluation: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """What the adapter gains, and how much of it round-to-nearest NF4 of the merged weights keeps. Leaves those weights in."""
    probs, ratios = {"separate": {domain: log_probs(peft, docs) for domain, docs in evaluation.items()}}, []
    with peft.disable_adapter():
        probs["base"] = {domain: log_probs(peft, docs) for domain, docs in evaluation.items()}
        for layer in (m for m in peft.modules() if hasattr(m, "get_delta_weight")):
            weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
            ratios.append((delta.norm() / weight.norm()).item())
            nf4 = bnb.functional.quantize_4bit(weight.data + delta, blocksize=64, compress_statistics=True, quant_type="nf4")
            weight.data = bnb.functional.dequantize_4bit(*nf4)
        probs["rtn"] = {domain: log_probs(peft, docs) for domain, docs in evaluation.items()}
    figures = {"delta_over_weight_mean": sum(ratios) / len(ratios)}
    for domain, docs in evaluation.items():
        sizes, n = torch.tensor([len(doc) - 1 for doc in docs]).double(), len(docs)
        nll = {name: doc_nll(found[domain], docs) for name, found in probs.items()}
        for name in ("base", "rtn"):
            pairs = zip(probs["separate"][domain], probs[name][domain], strict=True)
            figures[f"{domain}_kl_separate_to_{name}"] = sum((t.exp() * (t - p)).sum().item() for t, p in pairs) / sizes.sum().item()
        gains = nll["base"] - nll["separate"]
        mean = gains.sum() / sizes.sum()
        error = ((gains - mean * sizes).square().sum() * n / (n - 1)).sqrt() / sizes.sum()  # whole documents are the independent unit
        figures |= {f"{domain}_ppl_{name}": math.exp((total.sum() / sizes.sum()).item()) for name, total in nll.items()}
        figures |= {f"eval_{domain}_documents": n, f"eval_{domain}_predicted_tokens": int(sizes.sum()), f"{domain}_gain_nats": mean.item()}
        figures[f"{domain}_gain_standard_error"] = error.item()
    kept = math.log(figures["prose_ppl_base"] / figures["prose_ppl_rtn"]) / figures["prose_gain_nats"]
    return figures | {"prose_share_of_gain_kept_by_rtn": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/demo"))
    parser.add_argument("--steps", type=int, default=1200, help="steps of the base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps each: proves that it runs, not that it learns")
    args = parser.parse_args()
    steps, adapter_steps = (20, 5) if args.quick else (args.steps, ADAPTER_STEPS)
    figures: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "bitsandbytes": bnb.__version__}
    figures |= {"threads": torch.get_num_threads(), "seed": args.seed, "steps": steps, "adapter_steps": adapter_steps}
    figures["step_tokens"] = BATCH * WINDOW
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "LICENSE-PSF.txt").write_text(find_licence(), encoding="utf-8")

    def stage(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        figures[f"seconds_{name}"] = round(time.perf_counter() - start, 1)
        print(f"{name}: {figures[f'seconds_{name}']} s", flush=True)
        return result

    texts = stage("texts", lambda: split_texts(args.seed))
    for name in HELD_OUT:
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[name]))
    tokenizer = stage("tokenizer", lambda: train_tokenizer(texts["train-code"] + texts["train-prose"]))
    coded = {name: tokenizer([f"<s>{text}</s>" for text in docs], verbose=False)["input_ids"] for name, docs in texts.items()}
    ids = {name: [torch.tensor(doc) for doc in docs] for name, docs in coded.items()}
    figures |= {f"{name.replace('-', '_')}_tokens": sum(map(len, docs)) for name, docs in ids.items()}
    model = new_base(**{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")})
    figures["parameters"] = model.num_parameters()
    stage("base", lambda: train(model, ids["train-code"], steps, BASE_LR, args.seed))
    figures |= measure_code(model, ids["train-code"], ids["eval-code"])
    stage("nf4", lambda: save_nf4(model, tokenizer, args.out))
    peft = stage("adapter", lambda: train_adapter(ids["train-prose"], adapter_steps, args.seed, args.out))
    figures |= stage("figures", lambda: compare(peft, {"prose": ids["eval-prose"], "code": ids["eval-code"]}))
    assert AutoTokenizer.from_pretrained(args.out / "base-nf4").chat_template == CHAT, "the saved files alone must make the tokenizer"
    (args.out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(README.format(**figures), encoding="utf-8")
    for path in (p for p in args.out.rglob("*") if p.is_file()):
        if leak := [mark for mark in LOCAL if mark.encode() in path.read_bytes()]:
            raise SystemExit(f"{path.relative_to(args.out)} holds a local path: {leak[0]}")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
