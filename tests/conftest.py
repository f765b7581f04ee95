"""Tiny real models of several architectures, their NF4 forms, adapters on them, and the command line: made once per session, on demand."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

KINDS = ("llama", "qwen2", "gpt2", "gemma2")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gemma2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
VOCABULARY = 320
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
OWN = "the cat sat on a mat and saw seven birds near an old tree while rain fell over green hills at noon".split()
OTHER = "prices rose again after markets closed since traders expected lower rates from every central bank this year".split()


def sentences(words: list[str], count: int, seed: int) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choice(words) for _ in range(24)) for _ in range(count)]


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def build_config(kind: str, **changes: Any) -> Any:
    """Weights wide enough (0.09) that a random model's logits differ between tokens and between models."""
    import transformers as tf

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "initializer_range": 0.09, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    if kind == "llama":
        return tf.LlamaConfig(**common | {"tie_word_embeddings": False} | changes)
    if kind == "qwen2":
        return tf.Qwen2Config(**common | {"tie_word_embeddings": True} | changes)
    if kind == "gpt2":
        return tf.GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=128, initializer_range=0.09, bos_token_id=0, eos_token_id=1, **changes)
    return tf.Gemma2Config(**common | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]} | changes)


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(sentences(OWN, 50, 0) + sentences(OTHER, 50, 0), trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


def save_float(folder: Path, config: Any) -> str:
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1 (Gemma: 0), where a lost one would not show
                parameter.add_(0.05 * torch.randn_like(parameter))
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, temperature=0.7, do_sample=True)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def save_nf4(source: str, folder: Path, double: bool) -> str:
    """As QLoRA users do: transformers and bitsandbytes quantize while loading, and ``save_pretrained`` writes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=wish, device_map={"": "cpu"})
    model.save_pretrained(folder, save_original_format=False)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def save_adapter(base: str, folder: Path, trained_on: str, relative: float, seed: int, **lora: Any) -> str:
    """A PEFT adapter with random A and B, each pair scaled so that ‖ΔW‖ is ``relative`` of ‖W‖; saved modules are moved as much."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wish = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False} | lora)
    model = get_peft_model(model, wish)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "lora_B", None):
                wanted = relative * module.get_base_layer().weight.norm()
                module.lora_B["default"].weight.mul_(wanted / module.get_delta_weight("default").norm())
        for name, parameter in model.named_parameters():
            if ".modules_to_save.default" in name:
                parameter.add_(relative * parameter.norm() / parameter.numel() ** 0.5 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = trained_on
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT adds a copy of the base's head where the head has a pair
    return str(folder)


class Zoo:
    """Folders by kind, each made the first time it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, str] = {}
        self._asked: dict[str, Any] = {}
        self.calibration = write_rows(root / "calibration.jsonl", sentences(OWN, 60, 1))
        self.held_out = write_rows(root / "held_out.jsonl", sentences(OWN, 20, 2))
        self.other = write_rows(root / "other.jsonl", sentences(OTHER, 20, 3))

    def _once(self, key: str, build: Callable[[Path], str]) -> str:
        if key not in self._made:
            self._made[key] = build(self.root / key)
        return self._made[key]

    def float(self, kind: str, name: str | None = None, **changes: Any) -> str:
        key = f"{name or kind}-float"
        assert self._asked.setdefault(key, (kind, changes)) == (kind, changes), f"{key} was made with other settings"
        return self._once(key, lambda folder: save_float(folder, build_config(kind, **changes)))

    def nf4(self, kind: str, double: bool = True) -> str:
        return self._once(f"{kind}-nf4-{'double' if double else 'single'}", lambda folder: save_nf4(self.float(kind), folder, double))

    def adapter(self, kind: str, name: str = "plain", *, base: str | None = None, relative: float = 0.02, seed: int = 1, **lora: Any) -> str:
        lora = {"target_modules": TARGETS[kind]} | lora
        key = f"{kind}-adapter-{name}-{relative:g}"
        assert self._asked.setdefault(key, (base, seed, lora)) == (base, seed, lora), f"{key} was made with other settings"
        return self._once(key, lambda folder: save_adapter(self.float(kind), folder, base or self.nf4(kind), relative, seed, **lora))

    def batch(self, rows: int = 2, tokens: int = 64) -> torch.Tensor:
        """Token ids of held-out text ``[rows, tokens]``."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.float("llama"))
        ids = [i for line in Path(self.held_out).read_text().splitlines() for i in [0, *tokenizer(json.loads(line)["text"])["input_ids"], 1]]
        return torch.tensor(ids[: rows * tokens]).reshape(rows, tokens)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="write docs/support.md from the cells of tests/test_support_matrix.py")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: measures time or rates; nothing else may run beside it")


@pytest.fixture(scope="session", autouse=True)
def eager() -> None:
    """bitsandbytes and gptqmodel compile small functions of theirs for seconds; here they run as written."""
    torch.compiler.set_stance("force_eager")
    gc.freeze()  # the libraries' million objects are not searched for garbage again: gptqmodel collects at each load


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, zoo: Zoo) -> Any:
    from support.packed import Packed

    return Packed(tmp_path_factory.mktemp("packed"), zoo)


@dataclass(frozen=True)
class Answer:
    """What a command gave back. ``code`` is the exit code that a shell would see."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object) -> Answer:
    """``qmerge …`` through its real entry point, errors mapped to messages and exit codes, in this process."""
    from qmerge.cli.main import main

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    kept = {key: os.environ.get(key) for key in ("TRANSFORMERS_VERBOSITY", "BITSANDBYTES_NOWELCOME")}
    sys.argv = ["qmerge", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
        for key, value in kept.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Answer]:
    return run_cli


class Written:
    """Outputs of ``qmerge merge`` by their settings, each made once; ``weights`` are the fp32 ``[out, in]`` that the pipeline itself computed."""

    def __init__(self, root: Path, zoo: Zoo) -> None:
        self.root, self.zoo, self._made = root, zoo, {}

    def __call__(self, kind: str, fmt: str, *flags: str, base: str | None = None, adapter: str | None = None, fresh: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
        key = (kind, fmt, flags, base, adapter)
        if key not in self._made or fresh:
            made = self._merge(kind, fmt, flags, base or self.zoo.nf4(kind), adapter or self.zoo.adapter(kind))
            if fresh:
                return made
            self._made[key] = made
        return self._made[key]

    def _merge(self, kind: str, fmt: str, flags: tuple[str, ...], base: str, adapter: str) -> tuple[Path, dict[str, torch.Tensor]]:
        from qmerge.pipeline import tensors

        out, weights, inner = self.root / f"{kind}-{fmt}-{len(list(self.root.iterdir()))}", {}, tensors.to_pack

        def to_pack(solved: Any) -> Any:
            weights.update({name: result.weight for name, result in solved.items()})
            return inner(solved)

        text = () if fmt in ("bf16", "fp16") or "--rtn" in flags else ("--calibration", self.zoo.calibration, "--samples", 8, "--tokens", 64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "to_pack", to_pack)
            answer = run_cli("merge", "--base", base, "--adapter", adapter, "--out", out, "--format", fmt, "--device", "cpu", *text, *flags)
        assert answer.code == 0, answer.err
        return out, weights


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, zoo: Zoo) -> Written:
    return Written(tmp_path_factory.mktemp("written"), zoo)
