"""Where do the bench's own cases come from? This trains them: a GPT-NeoX of its own, and an adapter on the public stories260k, both as QLoRA is done.

`neox`: a GPT-NeoX (parallel blocks, fused query_key_value, biases, LayerNorm) learns web text and an encyclopedia from nothing, with the bench
tokenizer; transformers and bitsandbytes round it to NF4; PEFT trains a LoRA on questions with answers (ARC-easy, PIQA). `stories`: stories260k (hidden
64, feed-forward 172) rounded to NF4, and a LoRA on GSM8K. Seeded, one thread. Written beside each other: base-nf4, adapter, calibration.jsonl (the
adapter's training text), eval.jsonl where the text is split here, case.json with the measured figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTNeoXConfig, GPTNeoXForCausalLM

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
WINDOW, BATCH, SEED, THREADS = 256, 8, 0, 1
ROWS_PER_DOCUMENT, HELD_OUT_SHARE, STORIES_DOCUMENTS = 4, 0.3, 2000
NEOX = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
NEOX_LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PRETRAINING = {"steps": 600, "lr": 2e-3}
ADAPTERS = {"neox": {"steps": 120, "lr": 3e-4}, "stories": {"steps": 150, "lr": 4e-4}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=["neox", "stories"])
    parser.add_argument("out", type=Path, help="the folder to make; replaced whole")
    parser.add_argument("--shared", type=Path, default=SHARED, help="the folder with data/ and models/")
    parser.add_argument(
        "--steps", type=int, help="steps of each training (default: the case's own); a few prove that it runs, not that it learns"
    )
    args = parser.parse_args()
    torch.set_num_threads(THREADS)  # sums in another order give other weights
    torch.manual_seed(SEED)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f"{args.out.name}-") as scratch:
        folder = Path(scratch) / "case"
        folder.mkdir()
        facts = {"case": args.case, "seed": SEED, "threads": THREADS} | make(args.case, folder, args.shared, args.steps)
        (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(args.out, ignore_errors=True)
        folder.rename(args.out)
    print(json.dumps(facts, indent=1))


def make(case: str, out: Path, shared: Path, steps: int | None) -> dict[str, Any]:
    """Fill ``out`` and return what was measured."""
    began, facts = time.perf_counter(), {}
    source = shared / "models" / {"neox": "bench-llama-12m", "stories": "stories260k"}[case]
    tokenizer = AutoTokenizer.from_pretrained(source)
    if case == "neox":
        documents, held_out = questions(shared / "data")
        write_rows(out / "eval.jsonl", held_out)
        general = [(shared / "data" / name).read_text(encoding="utf-8") for name in ("c4-sample.txt", "wikitext2-valid-tokenised.txt")]
        model, found = pretrained_neox(tokenizer, general, steps or PRETRAINING["steps"])
        facts |= found
    else:
        rows = [json.loads(line)["text"] for line in (shared / "data/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()]
        documents, held_out = rows[:STORIES_DOCUMENTS], rows[-200:]
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    write_rows(out / "calibration.jsonl", documents)
    save_nf4(model, tokenizer, out / "base-nf4")
    plan = ADAPTERS[case] | ({"steps": steps} if steps else {})
    peft = adapter_on(out / "base-nf4", NEOX_LINEARS if case == "neox" else LLAMA_LINEARS, encoded(documents, tokenizer), **plan)
    save_adapter(peft, out / "adapter", NEOX_LINEARS if case == "neox" else LLAMA_LINEARS)
    facts |= {"parameters": sum(p.numel() for name, p in peft.named_parameters() if "lora_" not in name), "adapter_steps": plan["steps"]}
    return facts | gain(peft, windows(encoded(held_out, tokenizer))[:150]) | {"elapsed_s": round(time.perf_counter() - began, 1)}


def questions(data: Path) -> tuple[list[str], list[str]]:
    """(training, held out): documents of a few questions, each with its right answer, in a seeded order."""
    arc = [json.loads(line) for line in (data / "arc-easy-test.jsonl").read_text(encoding="utf-8").splitlines()]
    piqa = [json.loads(line) for line in (data / "piqa-valid.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [f"Question: {row.get('question') or row['goal']}\nAnswer: {row['choices'][row['answer']]}" for row in arc + piqa]
    rows = list(dict.fromkeys(rows))
    random.Random(SEED).shuffle(rows)
    documents = ["\n\n".join(rows[i : i + ROWS_PER_DOCUMENT]) for i in range(0, len(rows), ROWS_PER_DOCUMENT)]
    cut = round(len(documents) * (1 - HELD_OUT_SHARE))
    return documents[:cut], documents[cut:]


def write_rows(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")


def encoded(documents: list[str], tokenizer: Any) -> torch.Tensor:
    """One stream of ids, BOS and EOS around each document."""
    rows = [
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        for text in documents
    ]
    return torch.tensor([token for row in rows for token in row])


def windows(stream: torch.Tensor) -> torch.Tensor:
    """int64 ``[n, WINDOW]``, the rest left out."""
    return stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW)


def pretrained_neox(tokenizer: Any, texts: list[str], steps: int) -> tuple[Any, dict[str, Any]]:
    """The float model, and whether it learned more than how often each token occurs (perplexity on a tenth that it never saw)."""
    parts = [encoded([text], tokenizer) for text in texts]
    held_out = windows(torch.cat([part[-len(part) // 20 :] for part in parts]))
    stream = torch.cat([part[: -len(part) // 20] for part in parts])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), rotary_pct=0.25, **NEOX, **ids))
    train(model, stream, steps, PRETRAINING["lr"])
    counts = torch.bincount(stream, minlength=len(tokenizer)).double() + 1
    unigram = -(counts / counts.sum()).log()[held_out[:, 1:]].mean().item()
    nll = torch.cat([-log_probs(model, batch).gather(-1, batch[:, 1:, None]) for batch in held_out.split(BATCH)]).mean().item()
    facts = {
        "pretraining_tokens": len(stream),
        "pretraining_steps": steps,
        "held_out_ppl_unigram": math.exp(unigram),
        "held_out_ppl_float": math.exp(nll),
    }
    return model.to(torch.bfloat16), facts


def train(model: Any, stream: torch.Tensor, steps: int, lr: float) -> None:
    """AdamW over random windows, warm-up and cosine, in fp32: at these widths quicker than bf16 autocast (0.64 against 1.07 s a step of the NeoX, one thread)."""
    draw, weights = torch.Generator().manual_seed(SEED), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(20 * (step + 1) / steps, 0.525 + 0.475 * math.cos(math.pi * step / steps))
        batch = torch.stack([stream[i : i + WINDOW] for i in torch.randint(len(stream) - WINDOW, (BATCH,), generator=draw).tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.3f}", flush=True)
    model.eval()


def save_nf4(model: Any, tokenizer: Any, out: Path) -> None:
    """The bf16 model through transformers' own 4-bit loader; the float weights are not kept."""
    wish = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        AutoModelForCausalLM.from_pretrained(
            scratch, quantization_config=wish, dtype=torch.bfloat16, device_map={"": "cpu"}
        ).save_pretrained(out)
    tokenizer.save_pretrained(out)


def adapter_on(base: Path, linears: list[str], stream: torch.Tensor, steps: int, lr: float) -> PeftModel:
    """A LoRA on every linear of the NF4 base, whose linears hold the dequantized weights: on CPUs bitsandbytes repacks a Linear4bit when it first runs."""
    model = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}).dequantize().float()
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=linears, task_type="CAUSAL_LM"))
    train(peft, stream, steps, lr)
    return peft


def save_adapter(peft: PeftModel, out: Path, linears: list[str]) -> None:
    config = peft.peft_config["default"]
    config.base_model_name_or_path, config.target_modules = "base-nf4", linears  # PEFT holds a set, whose order changes from run to run
    peft.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


@torch.no_grad()
def log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """fp32 ``[B, T - 1, V]`` of the tokens after the first."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


@torch.no_grad()
def gain(peft: PeftModel, held_out: torch.Tensor) -> dict[str, Any]:
    """On held-out text of the adapter's domain: perplexity with and without it, KL from separate to the bare base, and the adapter's size."""
    nll, kl, count = {"base": 0.0, "separate": 0.0}, 0.0, held_out[:, 1:].numel()
    for batch in held_out.split(BATCH):
        with_adapter = log_probs(peft, batch)
        with peft.disable_adapter():
            bare = log_probs(peft, batch)
        kl += (with_adapter.exp() * (with_adapter - bare)).sum().item() / count
        for name, found in (("base", bare), ("separate", with_adapter)):
            nll[name] -= found.gather(-1, batch[:, 1:, None]).sum().item() / count
    layers = [module for module in peft.modules() if hasattr(module, "get_delta_weight")]
    size = sum((layer.get_delta_weight("default").norm() / layer.base_layer.weight.norm()).item() for layer in layers) / len(layers)
    facts = {
        "delta_over_weight_mean": size,
        "kl_separate_to_base": kl,
        "held_out_tokens": count,
        "bitsandbytes": bnb.__version__,
        "torch": torch.__version__,
    }
    return facts | {f"ppl_{name}": math.exp(value) for name, value in nll.items()}


if __name__ == "__main__":
    main()
