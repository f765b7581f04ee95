"""Several adapters on the command line: summed with weights, combined as PEFT combines them, one checkpoint for each, or one picked by its name."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.dequantized import base_model, logits
from safetensors.torch import load_file, save_file
from test_merge_identity import bits_differ, files_of, tensors_of
from test_merge_refusals import digests
from transformers import AutoModelForCausalLM

SAME = 1e-5
"""relative distance of fp32 logits: the order of fp32 additions. Adapters here move them by 0.02 and more"""
LORA: dict[str, dict[str, Any]] = {
    "a": {"target_modules": ["q_proj", "down_proj"], "r": 4},
    "b": {"target_modules": ["q_proj", "up_proj", "v_proj"], "r": 4, "lora_alpha": 4},
    "six": {"target_modules": ["q_proj", "up_proj"], "r": 6},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "r": 9, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norm": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


class Several:
    def __init__(self, zoo: Any, cli: Any, root: Path) -> None:
        self.zoo, self.cli, self.out, self.base = zoo, cli, root / "out", zoo.nf4("llama")

    def place(self, name: str) -> str:
        return self.zoo.adapter("llama", f"several-{name}", relative=0.1, seed=sum(map(ord, name)), **LORA[name])

    def words(self, *names: str, flags: Sequence[object] = (), fmt: str = "fp32", out: Path | None = None) -> list[object]:
        chosen = [part for name in names for part in ("--adapter", self.place(name.split("=")[0]) + name[len(name.split("=")[0]) :])]
        return ["merge", "--base", self.base, *chosen, "--out", out or self.out, "--format", fmt, "--device", "cpu", *flags]

    def merge(self, *names: str, **options: Any) -> Path:
        answer = self.cli(*self.words(*names, **options))
        assert answer.code == 0, answer.err
        return options.get("out") or self.out

    def refused(self, code: int, *says: str, names: Sequence[str], flags: Sequence[object] = ()) -> None:
        answer = self.cli(*self.words(*names, flags=flags))
        assert answer.code == code and not self.out.exists() and "Traceback" not in answer.err, answer.err
        assert all(word in answer.err for word in says), answer.err

    def peft(self, **weights: float) -> Any:
        """PEFT's model with all of them active, each scaled by its weight."""
        from peft import PeftModel

        model = None
        for name in weights:
            if model is None:
                model = PeftModel.from_pretrained(base_model(self.zoo.float("llama"), self.base), self.place(name), name)
            else:
                model.load_adapter(self.place(name), name)
        model.base_model.set_adapter(list(weights))
        for module in model.modules():
            for name, weight in weights.items():
                if isinstance(scaling := getattr(module, "scaling", None), dict) and name in scaling:
                    scaling[name] *= weight
        return model.eval()

    def answers(self, folder: Path) -> torch.Tensor:
        return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), self.zoo.batch())

    def same(self, folder: Path, model: Any) -> None:
        wanted = logits(model, self.zoo.batch())
        found, before = self.answers(folder), logits(base_model(self.zoo.float("llama"), self.base), self.zoo.batch())
        assert float((found - wanted).norm() / wanted.norm()) < SAME
        assert float((before - wanted).norm() / wanted.norm()) > 0.02

    def verified(self, *names: str, out: Path | None = None) -> None:
        chosen = [part for name in names for part in ("--adapter", self.place(name))]
        answer = self.cli("verify", out or self.out, "--base", self.base, *chosen)
        assert answer.code == 0, answer.err + answer.out


@pytest.fixture
def several(zoo, cli, tmp_path):
    return Several(zoo, cli, tmp_path)


SUMS = {
    "two": {"a": 1.0, "b": 0.5},
    "negative": {"a": 1.0, "b": -0.7},
    "three": {"a": 0.3, "b": 0.3, "six": 0.9},
    "rsLoRA beside plain": {"a": 1.0, "rslora": 0.5},
    "one scaled": {"a": 0.25},
    "two of DoRA": {"dora": 1.0, "a": 1.0},
}


@pytest.mark.parametrize("case", SUMS)
def test_weighted_sums_are_what_peft_answers(several, case):
    """A weight that is lost, squared, or put on the wrong adapter; rsLoRA's scaling taken for another's. And the checkpoint is derived again by verify."""
    weights = SUMS[case]
    out = several.merge(*(name if weight == 1.0 else f"{name}={weight}" for name, weight in weights.items()))
    several.same(out, several.peft(**weights))
    several.verified(*weights)


def test_a_weight_on_dora_scales_its_delta(several):
    """DoRA's delta is not linear in A and B: the weight is one of the whole delta, W + w (W' - W), as the help says."""
    half, whole = tensors_of(several.merge("dora=0.5", out=several.out / "half")), tensors_of(several.merge("dora", out=several.out / "whole"))
    base = tensors_of(several.merge("dora=0", out=several.out / "none"))
    for name, tensor in whole.items():
        assert torch.allclose(half[name], base[name] + (tensor - base[name]) / 2, rtol=0, atol=4 * 2**-24 * float(tensor.abs().max())), name


def test_a_saved_module_beside_another_adapter(several):
    """A saved head of one adapter goes beside the deltas of another; weighed, or saved by two, there is no answer."""
    out = several.merge("head", "a=0.5")
    head = load_file(Path(several.place("head")) / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(tensors_of(out)["lm_head.weight"], head.float())
    shutil.rmtree(out)
    several.refused(4, "lm_head.weight", "cannot be weighed", names=["head=0.5", "a"])
    several.refused(4, "lm_head.weight", "cannot be weighed", names=["head", "head"])


COMBINED = {
    "svd": {},
    "ties": {"density": 0.4},
    "ties_svd": {"density": 0.4},
    "dare_ties": {"density": 0.6},
    "dare_linear": {"density": 0.6},
    "dare_linear_svd": {"density": 0.6},
    "magnitude_prune": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
}


@pytest.mark.parametrize("how", COMBINED)
def test_combinations_are_those_of_peft(several, how):
    """A combination under PEFT's name that is not PEFT's; a seed that is not used, or not recorded: then verify cannot derive it again."""
    names = ("a", "b=0.5") if "svd" not in how else ("a", "six=0.5")
    flags = [word for key, value in COMBINED[how].items() for word in (f"--{key}", value)] + ["--combine", how, "--seed", 7]
    out = several.merge(*names, flags=flags)
    model = several.peft(**{name.split("=")[0]: 1.0 for name in names})
    torch.manual_seed(7)
    model.add_weighted_adapter([name.split("=")[0] for name in names], [1.0, 0.5], "joint", combination_type=how, **COMBINED[how])
    model.set_adapter("joint")
    several.same(out, model)
    several.verified(*(name.split("=")[0] for name in names))


def test_the_rank_of_a_combination(several):
    """--combine-rank that is not passed on."""
    out = several.merge("a", "six", flags=["--combine", "svd", "--combine-rank", 2])
    model = several.peft(a=1.0, six=1.0)
    model.add_weighted_adapter(["a", "six"], [1.0, 1.0], "joint", combination_type="svd", svd_rank=2)
    model.set_adapter("joint")
    several.same(out, model)
    several.verified("a", "six")


def test_another_seed_drops_other_values(several):
    """A seed that has no effect."""
    first, second, again = (
        tensors_of(several.merge("a", "b", flags=["--combine", "dare_linear", "--density", 0.5, "--seed", seed], out=several.out / str(number))) for number, seed in enumerate((1, 2, 1))
    )
    assert bits_differ(first, second) and not bits_differ(first, again)


@pytest.mark.parametrize("how, says", [("cat", "sqrt(rank)"), ("linear", "cross terms")])
def test_combinations_that_are_not_offered(several, how, says):
    """PEFT's two that are wrong in places, taken for the sum or refused without a reason."""
    several.refused(2, how, says, "exact weighted sum", names=["a", "b"], flags=["--combine", how])


@pytest.mark.parametrize(
    "code, says, names, flags",
    [
        (2, "no such", ["a", "b"], ["--combine", "average"]),
        (2, "at least two", ["a"], ["--combine", "svd"]),
        (2, "needs the share", ["a", "b"], ["--combine", "ties"]),
        (2, "--density", ["a", "b"], ["--density", 0.5]),
        (2, "keeps all", ["a", "b"], ["--combine", "svd", "--density", 0.5]),
        (4, "one rank", ["a", "six"], ["--combine", "ties", "--density", 0.5]),
        (4, "rsLoRA", ["rslora", "six"], ["--combine", "svd"]),
        (4, "DoRA", ["a", "dora"], ["--combine", "svd"]),
        (4, "modules_to_save", ["a", "head"], ["--combine", "svd"]),
        (2, "no number", ["a=much"], []),
        (2, "no number", ["a=nan"], []),
        (2, "no number", ["a=inf"], []),
        (2, "--each", ["a"], ["--each"]),
        (2, "--each", ["a", "b"], ["--each", "--combine", "svd"]),
        (4, "twice", ["a", "a"], ["--each"]),
    ],
)
def test_what_has_no_meaning_is_refused(several, code, says, names, flags):
    """A combination that falls back to another, a number that is ignored, an output written twice."""
    says = "average" if says == "no such" else says
    several.refused(code, says, names=names, flags=flags)


# ---- one checkpoint per adapter


def test_each_is_byte_for_byte_its_single_merge(several, tmp_path):
    """Stretches of the base that one adapter changes in place and the next one then merges into; a config or a record of one adapter in another's folder."""
    chosen = ("a", "b", "dora", "norm", "head")
    several.merge(*chosen, flags=["--each"])
    assert sorted(path.name for path in several.out.iterdir()) == sorted(Path(several.place(name)).name for name in chosen)
    for name in chosen:
        alone = several.merge(name, out=tmp_path / f"alone-{name}")
        assert files_of(several.out / Path(several.place(name)).name) == files_of(alone), name
        several.verified(name, out=several.out / Path(several.place(name)).name)


@pytest.mark.parametrize("base", ["nf4", "float"])
def test_each_reads_the_base_once(several, monkeypatch, base):
    """A "shared" pass that reads (or hashes) the base again for every adapter: with ten adapters and 140 GB that is hours."""
    from qmerge.store import manifest

    read, hashed, inner, digest = Counter(), Counter(), os.preadv, manifest.digest_file
    flags = ["--each"]
    if base == "float":
        several.base, flags = several.zoo.float("llama"), ["--each", "--on", "original"]
    file = Path(several.base) / "model.safetensors"

    def preadv(handle: int, buffers: Any, offset: int) -> int:
        count = inner(handle, buffers, offset)
        read[os.readlink(f"/proc/self/fd/{handle}")] += count
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(manifest, "digest_file", lambda path: hashed.update([str(path)]) or digest(path))
    several.merge("a", flags=flags[1:], fmt="bf16")
    once = read[str(file)]
    read.clear()
    hashed.clear()
    shutil.rmtree(several.out)
    several.merge("a", "b", "six", flags=flags, fmt="bf16")
    assert once >= 0.9 * (file.stat().st_size - 20_000) and hashed[str(file)] == 1
    assert read[str(file)] <= 1.1 * once, f"{read[str(file)] / once:.2f} times"


def test_each_or_none(several, tmp_path):
    """The first adapter's folder published although the second was refused, or a folder OUT that stays behind empty."""
    broken = tmp_path / "broken"
    shutil.copytree(several.place("b"), broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    before = digests(several.base)
    answer = several.cli(*several.words("a", flags=["--adapter", broken, "--each"]))
    assert answer.code == 4 and "NaN" in answer.err and not several.out.exists() and digests(several.base) == before


# ---- one of several in a folder, pickles, recipes, what is said


def test_one_of_several_in_a_folder(several, tmp_path):
    """The first adapter of a folder taken where another was named; two of one folder that overwrite each other with --each."""
    shutil.copytree(several.place("a"), tmp_path / "all" / "first")
    shutil.copytree(several.place("b"), tmp_path / "all" / "second")
    base, folder = several.base, tmp_path / "all"
    words = ["merge", "--base", base, "--out", several.out, "--format", "fp32", "--device", "cpu"]
    assert several.cli(*words, "--adapter", folder).code == 4
    assert several.cli(*words, "--adapter", f"{folder}#third").code == 4 and not several.out.exists()
    assert several.cli(*words, "--adapter", f"{folder}#second").code == 0
    assert not bits_differ(tensors_of(several.out), tensors_of(several.merge("b", out=tmp_path / "alone")))
    assert several.cli("verify", several.out, "--base", base, "--adapter", f"{folder}#second").code == 0
    assert several.cli("verify", several.out, "--base", base, "--adapter", f"{folder}#first").code == 1
    shutil.rmtree(several.out)
    assert several.cli(*words, "--adapter", f"{folder}#first", "--adapter", f"{folder}#second=0.5").code == 0
    assert not bits_differ(tensors_of(several.out), tensors_of(several.merge("a", "b=0.5", out=tmp_path / "both")))
    shutil.rmtree(several.out)
    assert several.cli(*words, "--adapter", f"{folder}#first", "--adapter", f"{folder}#second", "--each").code == 0
    assert sorted(path.name for path in several.out.iterdir()) == ["first", "second"]


def test_pickles_only_when_asked_for(several, tmp_path):
    """A pickle that is read unasked; or asked for, merged and then not accepted by verify."""
    folder = tmp_path / "pickled"
    shutil.copytree(several.place("a"), folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    words = ["merge", "--base", several.base, "--adapter", folder, "--out", several.out, "--format", "fp32", "--device", "cpu"]
    answer = several.cli(*words)
    assert answer.code == 4 and "--allow-pickle" in answer.err and not several.out.exists()
    assert several.cli(*words, "--allow-pickle").code == 0
    assert not bits_differ(tensors_of(several.out), tensors_of(several.merge("a", out=tmp_path / "alone")))
    assert several.cli("verify", several.out, "--base", several.base, "--adapter", folder, "--allow-pickle").code == 0
    assert "adapter_model.bin" in json.loads((several.out / "manifest.json").read_text())["inputs"]["adapter"]["files"]


def test_verify_takes_the_words_of_the_merge(several):
    """Weights repeated to verify as they were given to merge: understood; other weights, another order or another number of adapters: refused or failed."""
    several.merge("a", "b=0.5")
    a, b = several.place("a"), several.place("b")
    verify = ["verify", several.out, "--base", several.base]
    assert several.cli(*verify, "--adapter", a, "--adapter", f"{b}=0.5").code == 0
    assert several.cli(*verify, "--adapter", a, "--adapter", f"{b}=0.7").code == 4
    assert several.cli(*verify, "--adapter", a).code == 4
    assert several.cli(*verify, "--adapter", b, "--adapter", a).code == 1


def test_verify_of_one_adapter_refuses_two(several):
    """A single merge held against a sum of two: the manifest has no weights then."""
    several.merge("a")
    answer = several.cli("verify", several.out, "--base", several.base, "--adapter", several.place("a"), "--adapter", several.place("b"))
    assert answer.code == 4 and "another number of adapters" in answer.err


def test_dry_run_and_json_tell_all_adapters(several):
    """A plan that names the first adapter only, or none of the weights."""
    words = several.words("a", "b=0.5", fmt="bf16")
    told, shown = several.cli(*words, "--dry-run", "--json"), several.cli(*words, "--dry-run")
    names = [Path(several.place(name)).name for name in "ab"]
    assert told.code == 0 and shown.code == 0 and not several.out.exists()
    facts = json.loads(told.out)
    assert facts["adapters"] == names and facts["weights"] == [1.0, 0.5] and facts["tensors_changed_by_the_adapter"] == 8
    assert all(name in shown.out for name in names) and "0.5" in shown.out
    each = several.cli(*words[: words.index("--out")], "--out", several.out, "--format", "bf16", "--each", "--dry-run", "--json")
    assert each.code == 0 and [found["adapters"] for found in json.loads(each.out)] == [[name] for name in names]
    done = several.cli(*words, "--json")
    assert done.code == 0 and json.loads(done.out)["adapters"] == facts["adapters"] and json.loads(done.out)["out"] == str(several.out)


def test_the_same_adapter_twice(several, tmp_path):
    """Two weights for one name, of which a table by name keeps one."""
    out = several.merge("a=0.25", "a=0.75", out=tmp_path / "twice")
    whole = several.merge("a", out=tmp_path / "once")
    for name, tensor in tensors_of(whole).items():
        assert torch.allclose(tensors_of(out)[name], tensor, rtol=0, atol=4 * 2**-24 * float(tensor.abs().max())), name
    told = several.cli(*several.words("a=0.25", "a=0.75"), "--dry-run", "--json")
    assert sorted(json.loads(told.out)["weights"]) == [0.25, 0.75]


def test_a_recipe_file_lists_adapters(several, tmp_path):
    """A list in YAML that is taken for one name, or whose weights are lost; flags win over it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"base": several.base, "adapter": [several.place("a"), f"{several.place('b')}=0.5"], "format": "fp32", "device": "cpu", "out": str(several.out)}))
    assert several.cli("merge", "--recipe", path).code == 0
    assert not bits_differ(tensors_of(several.out), tensors_of(several.merge("a", "b=0.5", out=tmp_path / "flags")))
    assert several.cli("merge", "--recipe", path, "--adapter", several.place("b"), "--out", tmp_path / "one").code == 0
    assert not bits_differ(tensors_of(tmp_path / "one"), tensors_of(several.merge("b", out=tmp_path / "alone")))


def test_a_place_that_no_file_system_can_name_is_a_choice_all_the_same():
    """A traceback of the operating system's for a long name with a weight (found by fuzzing a recipe); opening it says what is wrong."""
    from qmerge.adapters.choices import parse_choice

    assert parse_choice("a" * 5000 + "=0.5").weight == 0.5
