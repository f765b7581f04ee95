"""Which adapter features are the rows of the support matrix, and what does each claim for each architecture?

A feature is a function from an `Architecture` to a cell. Blank cells say why nothing can be there.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.adapters import CONFIG, WEIGHTS, Blank, Cell, Exact, Refusal, disagreeing, keys, named, pickled, settings
from support.architectures import HIDDEN, VOCABULARY, Architecture
from support.references import by_hand

GROWN = 3
"""tokens that a resized vocabulary has more"""
Feature = Callable[[Architecture], Cell]


def lora(arch: Architecture, *more: str, **fields: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": [*arch.linears, *more]} | fields


def exact(**fields: Any) -> Feature:
    """The same LoRA fields on every architecture."""
    return lambda arch: Exact(lora(arch, **fields))


def attention(**fields: Any) -> Feature:
    return lambda arch: Exact(lora(arch, target_modules=arch.attention, **fields))


def where_tied(feature: Feature) -> Feature:
    return lambda arch: feature(arch) if arch.tied else Blank("the head is not tied")


def where_experts(feature: Feature) -> Feature:
    return lambda arch: feature(arch) if arch.apart else Blank("no experts that were once linears")


def patterns(arch: Architecture) -> Cell:
    first, second = arch.attention
    ranks = {first: 2, rf"{arch.blocks}\.1\..*{second}": 6} if arch.key != "gpt2" else {r"attn\.c_proj": 2, r"h\.1\.mlp\..*": 6}
    return Exact(lora(arch, rank_pattern=ranks, alpha_pattern={rf"{arch.blocks}\.0\..*": 3}))


def lora_bias(arch: Architecture) -> Cell:
    free = [name for name in arch.linears if name not in arch.biased]
    if arch.biased:
        return Exact(lora(arch, target_modules=list(arch.biased), lora_bias=True))
    return Refusal("bias to a linear that has none", "these linears have no bias to add to", Exact(lora(arch, target_modules=free[:1], lora_bias=True)))


def lora_bias_without(arch: Architecture) -> Cell:
    free = [name for name in arch.linears if name not in arch.biased]
    if not free:
        return Blank("every linear has a bias")
    return Refusal("bias to a linear that has none", "the model's class has no bias there, so no loader would read one", Exact(lora(arch, target_modules=free[:1], lora_bias=True)))


def saved(*names: str) -> Feature:
    def cell(arch: Architecture) -> Cell:
        real = {"embedding": arch.embedding, "norm": arch.norm}
        return Exact(lora(arch, target_modules=arch.attention, modules_to_save=[real.get(name, name) for name in names]))

    return cell


def on_ends(*names: str, **fields: Any) -> Feature:
    def cell(arch: Architecture) -> Cell:
        real = {"embedding": arch.embedding, "head": "lm_head"}
        return Exact(lora(arch, target_modules=[*arch.attention, *(real[name] for name in names)], **fields), save={"save_embedding_layers": "auto"})

    return cell


def tied_pairs(arch: Architecture) -> Cell:
    case = on_ends("embedding", "head", ensure_weight_tying=True)(arch)
    if arch.key != "gpt2":
        return case
    return replace(case, oracle="live", note="PEFT's reload puts no LoRA on the head, though the file holds its pair, and answers otherwise than the model that was saved; the reference is the trained model")


def tokens(both: bool = False) -> Feature:
    def cell(arch: Architecture) -> Cell:
        table = {arch.embedding: [3, 5, 90], "lm_head": [7, 90]} if both else [3, 5, 90]
        return Exact(lora(arch, target_modules=arch.attention, trainable_token_indices=table))

    return cell


def grow(model: Any) -> None:
    torch.manual_seed(11)
    model.resize_token_embeddings(VOCABULARY + GROWN, mean_resizing=False)


def resized(**fields: Any) -> Feature:
    def cell(arch: Architecture) -> Cell:
        more = {"modules_to_save": [arch.embedding, "lm_head"]} if fields.get("both") else {}
        return Exact(lora(arch, target_modules=arch.attention, **more), prepare=grow, save={"save_embedding_layers": True})

    return cell


def fused(**fields: Any) -> Feature:
    def cell(arch: Architecture) -> Cell:
        if not arch.fused:
            return Blank("no fused experts")
        return Exact(lora(arch, target_modules=arch.attention, target_parameters=list(arch.fused), **fields))

    return cell


def bare(arch: Architecture) -> Cell:
    case = Exact(lora(arch, target_modules=[], target_parameters=[f"{arch.attention[0]}.weight"]))
    if arch.key == "gpt2":
        return Refusal("bare weight of a Conv1D", "PEFT would lay the delta across the transposed weight", case)
    return case


def old_experts(arch: Architecture) -> Cell:
    """One pair per expert, as PEFT wrote them when experts were modules; written by hand, for PEFT no longer does."""
    shapes = {"w1": (96, HIDDEN), "w3": (96, HIDDEN), "w2": (HIDDEN, 96)} if arch.key == "mixtral" else {"gate_proj": (48, HIDDEN), "up_proj": (48, HIDDEN), "down_proj": (HIDDEN, 48)}

    def change(folder: Path) -> None:
        torch.manual_seed(5)
        tensors = {}
        for layer in range(2):
            for expert in range(4):
                for name, (rows, columns) in shapes.items():
                    stem = f"base_model.model.model.layers.{layer}.{arch.experts}.{expert}.{name}.lora_"
                    tensors |= {f"{stem}A.weight": 0.15 * torch.randn(4, columns), f"{stem}B.weight": 0.15 * torch.randn(rows, 4)}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"target_modules": sorted(shapes)}))

    return Exact(lora(arch), change=change)


def stacked(model: Any, folder: Path) -> Any:
    """The replicated stack by hand: PEFT's own leaves ``config.layer_types`` at the base's length, and its forward fails."""
    layers = [0, 1, 1]
    stack = model.model.layers
    model.model.layers = type(stack)(copy.deepcopy(stack[layer]) for layer in layers)
    config = model.config.get_text_config()
    config.layer_types, config.num_hidden_layers = [config.layer_types[layer] for layer in layers], len(layers)
    for number, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    return by_hand(model, folder)


def replicated(arch: Architecture) -> Cell:
    if arch.key == "gpt2":
        return Blank("PEFT replicates layers of Llama-like trees only")
    return Exact(lora(arch, layer_replication=[[0, 2], [1, 2]]), oracle=stacked if arch.key in ("qwen2", "gemma2", "gpt_oss") else None)


def chosen(arch: Architecture) -> Cell:
    return Exact(lora(arch, exclude_modules=[arch.linears[1]], layers_to_transform=[1], layers_pattern=arch.blocks))


def block_diagonal(arch: Architecture) -> Cell:
    if arch.key == "gpt2":
        return Blank("PEFT has BD-LoRA for `nn.Linear` only")
    return Exact(lora(arch, use_bdlora={"target_modules_bd_a": [arch.linears[0]], "target_modules_bd_b": [arch.linears[1]], "nblocks": 2, "match_strict": False}))


def everything(arch: Architecture) -> Cell:
    norms = [arch.norm] if arch.key != "gpt2" else ["ln_f"]
    return Exact(lora(arch, use_dora=True, use_rslora=True, rank_pattern={arch.attention[0]: 6}, modules_to_save=norms, trainable_token_indices=[3, 5, 90]))


def marks(arch: Architecture) -> Cell:
    """As torch.compile around the model, FSDP around each block and activation checkpointing leave them in keys."""
    block = re.compile(rf"\.{arch.blocks}\.(\d+)\.")
    return Exact(lora(arch), change=keys(lambda key: block.sub(rf".{arch.blocks}.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key).replace("base_model.model.", "base_model.model._orig_mod.")),
                 oracle=by_hand)  # fmt: skip


def pissa(**flags: Any) -> Feature:
    """The trained model itself is the reference: PEFT's loader would initialise the base anew."""
    return lambda arch: Exact(lora(arch, target_modules=arch.attention, init_lora_weights="pissa"), flags=flags, oracle="live", base="float" if flags else None)


def told(message: str, why: str, **fields: Any) -> Feature:
    """A plain adapter whose config says that it is something else."""
    return lambda arch: Refusal(message, why, Exact(lora(arch), change=settings(**fields)))


CHANGED = "initialisation changed the base"
WHY_CHANGED = "the initialisation took part of the base; undone where the folder keeps the adapter before training, or with `--residual-base`"

FEATURES: dict[str, dict[str, Feature]] = {
    "Low-rank updates of linears": {
        "LoRA": exact(),
        "rsLoRA": exact(use_rslora=True, r=6),
        "`target_modules=\"all-linear\"`": lambda arch: Exact(lora(arch, target_modules="all-linear")),
        "`rank_pattern` and `alpha_pattern`, with regular expressions": patterns,
        "`exclude_modules`, `layers_to_transform`": chosen,
        "DoRA": exact(use_dora=True),
        "DoRA, rsLoRA, `rank_pattern`, a saved norm and trained tokens together": everything,
        "BD-LoRA (`use_bdlora`)": block_diagonal,
        "MonteCLoRA": attention(monteclora_config={"num_samples": 2, "buffer_size": 4}),
        "VeLoRA": attention(velora_config={"num_groups": 4}),
        "`layer_replication`": replicated,
    },
    "Biases": {
        "`lora_bias`, linears with a bias": lambda arch: lora_bias(arch) if arch.biased else Blank("no linear has a bias"),
        "`lora_bias`, linears without one": lora_bias_without,
        "`bias=\"all\"`": exact(bias="all"),
        "`bias=\"lora_only\"`": exact(bias="lora_only"),
    },
    "Embedding, head, norms, vocabulary": {
        "`modules_to_save`: head": saved("lm_head"),
        "`modules_to_save`: embedding": saved("embedding"),
        "`modules_to_save`: embedding and head": saved("embedding", "lm_head"),
        "`modules_to_save`: norm": saved("norm"),
        "LoRA on the embedding": on_ends("embedding"),
        "DoRA on the embedding": on_ends("embedding", use_dora=True),
        "LoRA on the head": on_ends("head"),
        "LoRA on embedding and head": on_ends("embedding", "head"),
        "`ensure_weight_tying`, embedding saved": where_tied(lambda arch: Exact(lora(arch, target_modules=arch.attention, modules_to_save=[arch.embedding], ensure_weight_tying=True))),
        "`ensure_weight_tying`, LoRA on embedding and head": where_tied(tied_pairs),
        "`ensure_weight_tying`, LoRA on the embedding": where_tied(on_ends("embedding", ensure_weight_tying=True)),
        "`trainable_token_indices`, a list": tokens(),
        "`trainable_token_indices`, embedding and head": tokens(both=True),
        "`trainable_token_indices`, a list, and LoRA on the head": lambda arch: Exact(
            lora(arch, target_modules=[*arch.attention, "lm_head"], trainable_token_indices=[3, 5, 90])),
        "new tokens: resized, only they train (`trainable_token_indices`)": lambda arch: Exact(
            lora(arch, target_modules=arch.attention, trainable_token_indices=[96, 97, 98]), prepare=grow, save={"save_embedding_layers": True}),
        "new tokens: resized, embedding in `modules_to_save`": lambda arch: Exact(
            lora(arch, target_modules=arch.attention, modules_to_save=[arch.embedding]), prepare=grow, save={"save_embedding_layers": True}),
        "new tokens: resized, LoRA on embedding and head": lambda arch: Exact(
            lora(arch, target_modules=[*arch.attention, arch.embedding, "lm_head"]), prepare=grow, save={"save_embedding_layers": True}),
        "new tokens: resized, both ends saved unasked": resized(),
        "new tokens: resized, both ends in `modules_to_save`": resized(both=True),
    },
    "Experts": {
        "`target_parameters`: fused experts": fused(),
        "fused experts with rsLoRA and patterns": fused(use_rslora=True, rank_pattern={r".*experts\.down_proj": 6}, alpha_pattern={r"layers\.1\..*": 3}),
        "`target_parameters`: a linear's weight": bare,
        "experts as linears, today's PEFT (`target_modules`)": where_experts(lambda arch: Exact(lora(arch, target_modules=list(arch.apart)))),
        "one pair per expert, PEFT before 0.19": where_experts(old_experts),
    },
    "Initialisations": {
        "gaussian": exact(init_lora_weights="gaussian"),
        "orthogonal": exact(init_lora_weights="orthogonal"),
        "EVA": exact(init_lora_weights="eva"),
        "MiCA": exact(init_lora_weights="mica"),
        "PiSSA, `pissa_init` kept": pissa(),
        "PiSSA and others, `--residual-base`": pissa(residual_base=True),
        "PiSSA": told(CHANGED, WHY_CHANGED, init_lora_weights="pissa_niter_4"),
        "OLoRA": told(CHANGED, WHY_CHANGED, init_lora_weights="olora"),
        "CorDA": told(CHANGED, WHY_CHANGED, init_lora_weights="corda"),
        "LoftQ": told(CHANGED, WHY_CHANGED, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        "LoRA-GA": told(CHANGED, WHY_CHANGED, init_lora_weights="lora_ga"),
        "KaSA": told("KaSA", "it cuts components out of the base before it adds its delta", kasa_config={"beta": 1e-4, "gamma": 1e-3}),
    },
    "Not a weight": {
        "aLoRA": told("activated LoRA", "it applies to some tokens only", alora_invocation_tokens=[1, 2]),
        "Arrow": told("Arrow", "each token takes other adapters", arrow_config={"top_k": 2}),
    },
    "Files": {
        "keys with marks of wrappers (`_orig_mod`, FSDP, checkpointing)": marks,
        "pickle, `--allow-pickle`": lambda arch: Exact(lora(arch), change=pickled, flags={"allow_pickle": True}) if arch.key == "llama" else Blank(
            "tested once: reading a pickle takes a process of its own, and knows of no architecture"),
        "pickle": lambda arch: Refusal("pickle", "a pickle can run code", Exact(lora(arch), change=pickled)),
        "one of several in a folder (`folder#name`)": lambda arch: Exact(lora(arch), change=named("mine"), flags={"pick": "#mine"}),
        "a saved module twice in one file, not the same": lambda arch: Refusal("holds a module twice", "PEFT's loader would take one of them, silently", Exact(
            lora(arch, target_modules=arch.attention, modules_to_save=["lm_head"]), prepare=grow, save={"save_embedding_layers": True}, change=disagreeing)),
        "several in a folder, none named": lambda arch: Refusal("several adapters", "which of them is not for qmerge to guess", Exact(lora(arch), change=named("mine"))),
    },
}  # fmt: skip
