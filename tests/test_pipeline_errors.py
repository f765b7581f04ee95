"""What goes wrong before the work begins ends in one clear message and the right exit code, with nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_rows


class Case:
    """A merge that would work; a test breaks one thing. ``folder`` is where OUT would grow."""

    def __init__(self, zoo, cli, folder: Path) -> None:
        self.zoo, self.cli, self.folder = zoo, cli, folder
        self.options = {"base": zoo.nf4("llama"), "adapter": zoo.adapter("llama"), "out": str(folder / "out"), "calibration": zoo.calibration,
                        "format": "gptq", "samples": 8, "tokens": 64, "device": "cpu"}  # fmt: skip

    def __call__(self, *more: str, command: str = "merge", **changes: object):
        options = {key: value for key, value in (self.options | changes).items() if value is not None}
        return self.cli(command, *(part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))), *more)

    def refused(self, code: int, *words: str, more: tuple[str, ...] = (), command: str = "merge", **changes: object) -> str:
        before = sorted(str(path) for path in self.folder.rglob("*"))
        answer = self(*more, command=command, **changes)
        assert answer.code == code, answer.err
        for word in words:
            assert word in answer.err, answer.err
        assert sorted(str(path) for path in self.folder.rglob("*")) == before, "something was written"
        assert "Traceback" not in answer.err and answer.err.count("error:") + answer.err.count("Error:") == 1
        return answer.err


@pytest.fixture
def case(zoo, cli, tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    return Case(zoo, cli, folder)


def test_the_case_itself_works(case):
    """Refusals below that have another reason than the one that they test."""
    assert case("--dry-run").code == 0 and list(case.folder.iterdir()) == []


def test_missing_adapter_file(case, tmp_path):
    """A folder with a config and no weights merged as an empty adapter."""
    shutil.copytree(case.zoo.adapter("llama"), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    case.refused(4, "adapter_model.safetensors", "written:    nothing", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("role", ["base", "adapter"])
def test_missing_folder(case, role, tmp_path):
    """A misspelt path looked up on the hub for a minute, or a traceback."""
    case.refused(4, str(tmp_path / "nowhere"), **{role: tmp_path / "nowhere"})


def test_adapter_of_another_architecture(case):
    """Pairs that find no module, left out without a word."""
    case.refused(4, "another base", "transformer.h.0", adapter=case.zoo.adapter("gpt2"))


def test_adapter_of_another_size(case):
    """Shapes that differ, found out by a crash in the middle of the run."""
    zoo = case.zoo
    wide = zoo.float("llama", "wide", intermediate_size=512)
    from conftest import TARGETS, save_adapter

    adapter = zoo._once("adapter-of-wide", lambda folder: save_adapter(wide, folder, "wide", 0.02, 1, target_modules=TARGETS["llama"]))
    case.refused(4, "another base", "down_proj", "[128, 512]", "[128, 256]", adapter=adapter)


def test_existing_out(case):
    """An OUT that is overwritten unasked, or a folder of somebody else's that is with leave."""
    out = case.folder / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    case.refused(4, "The output exists", "--overwrite")
    case.refused(4, "not written by qmerge", more=("--overwrite",))


def test_out_inside_an_input(case):
    """Writing into the base."""
    case.refused(4, "inside an input", out=Path(case.zoo.nf4("llama")) / "merged")


@pytest.mark.parametrize("content, says", [("", "empty"), ("\n\n", "empty"), ('{"text": ""}\n', "no documents"), ("{not json\n", "not JSON"), ('{"other": 1}\n', "`text`")])
def test_calibration_without_text(case, tmp_path, content, says):
    """Statistics of nothing: an empty or malformed file must not end in a division by zero tokens."""
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    case.refused(4, "empty.jsonl", says, calibration=path)


def test_calibration_shorter_than_a_window(case, tmp_path):
    """A padded window, or a Hessian of ten tokens that nobody knows of."""
    case.refused(4, "shorter than one window", "--tokens", calibration=write_rows(tmp_path / "short.jsonl", ["the cat sat"]))


def test_no_calibration_file(case, tmp_path):
    """A misspelt file taken for a dataset of the hub."""
    case.refused(4, "missing.jsonl", "no such file", calibration=tmp_path / "missing.jsonl")


@pytest.mark.parametrize("fmt", ["gptq", "nf4"])
def test_quantizing_without_calibration(case, fmt):
    """Rounding to nearest because no text was given: the fine-tune would be gone, unsaid."""
    case.refused(4, "no calibration text was given", "--rtn", calibration=None, format=fmt)


def test_unknown_format(case):
    """A format taken for the default."""
    case.refused(2, "int3", "no such format", "gptq, nf4, fp4, compressed-tensors, awq, bf16", format="int3")


@pytest.mark.parametrize("option, value", [("bits", 5), ("group_size", 100), ("samples", 1), ("tokens", 1), ("generic_share", 1.5)])
def test_values_out_of_range(case, option, value):
    """A number that is accepted and fails later, or is silently clipped."""
    case.refused(2, f"--{option.replace('_', '-')} {value}", **{option: value})


def test_float_base_without_a_word(case):
    """Guessing which base the adapter was trained on."""
    case.refused(4, "must not be guessed", "--nf4-recipe", "--on original", base=case.zoo.float("llama"))


def test_recipe_for_a_serialized_base(case):
    """A recipe that is ignored because the base brings its own."""
    case.refused(4, "in NF4 already", nf4_recipe="double")


def test_malformed_recipe_lists_every_fault(case, tmp_path):
    """One fault per attempt: five runs to find five typos."""
    path = tmp_path / "recipe.yaml"
    path.write_text("formt: gptq\nbits: four\ngroup_size: 100\nseed: true\n")
    said = case.refused(2, "formt", "bits: expected a whole number, found 'four'", "seed: expected a whole number, found True", "--generic-share 2", "--adapter is missing", more=("--recipe", str(path), "--generic-share", "2"), adapter=None)
    assert "--group-size 100" in said


@pytest.mark.parametrize("content, says", [("- a\n", "expected a mapping"), ("a: [\n", "not YAML"), ("!!python/object/apply:os.system ['true']\n", "not YAML")])
def test_recipes_that_are_none(case, tmp_path, content, says):
    """A list read as settings, or a YAML tag that runs code."""
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    case.refused(2, says, more=("--recipe", str(path)))


@pytest.mark.parametrize("setting, says", [("colour=red", "colour"), ("samples", "key=value"), ("seed=many", "seed: expected a whole number")])
def test_set_faults(case, setting, says):
    """A setting with a typo that is dropped."""
    case.refused(2, says, more=("--set", setting))


@pytest.mark.parametrize("setting", ["generic-share=0.5", "seed=3"])
def test_set_works(case, setting):
    """A setting that is checked and not used, or refused by its own name."""
    assert case("--dry-run", "--set", setting).code == 0


def test_malformed_yaml_in_set(case):
    """A traceback from the YAML reader."""
    case.refused(2, "--set", more=("--set", "template={a: ["))


def test_original_without_on(case):
    """``--original`` given and not used."""
    case.refused(2, "--original", original=case.zoo.float("llama"))


def test_rtn_with_calibration(case):
    """Calibration text that is given and not looked at."""
    case.refused(2, "--rtn", more=("--rtn",))


def test_unknown_option(case):
    """click's own message, and its exit code."""
    case.refused(2, "--colour", more=("--colour", "red"))


@pytest.mark.parametrize("command", ["merge", "run"])
def test_no_cuda(case, command, monkeypatch):
    """A silent fall-back to the CPU. Refused before anything is computed."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    case.refused(2, "no CUDA device", device="cuda", command=command, **({"text": case.zoo.held_out} if command == "run" else {}))


def test_overlap_between_calibration_and_evaluation(case, tmp_path):
    """A merged model that is measured on the text that it was solved on."""
    rows = [json.loads(line)["text"] for line in Path(case.zoo.calibration).read_text().splitlines()]
    text = write_rows(tmp_path / "eval.jsonl", ["something else entirely", *(f"And then, {row}" for row in rows)])
    said = case.refused(4, "calibration and evaluation text overlap", "--allow-overlap", command="run", text=text)
    assert any(" ".join(row.split()[:13]) in said for row in rows)


def test_overlap_with_generic_text(case, tmp_path):
    """Only the adapter's own text being compared."""
    shutil.copy(case.zoo.other, tmp_path / "eval.jsonl")
    case.refused(4, "text overlap", command="run", text=tmp_path / "eval.jsonl", generic=case.zoo.other)


def test_run_without_evaluation_text_or_calibration(case):
    """A merge whose evidence is about nothing."""
    case.refused(4, "no text to measure on", command="run", calibration=None, format="bf16")


def test_unknown_budget_is_found_before_the_merge(case):
    """An hour of work, and then a misspelt budget."""
    answer = case(command="run", text=case.zoo.held_out, budget="lenint")
    assert answer.code in (2, 4) and "lenint" in answer.err and list(case.folder.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(case, monkeypatch):
    """A half-written OUT, or its temporary folder, after an error in the middle."""
    from qmerge.errors import Refused
    from qmerge.pipeline import run

    def broken(*_: object) -> None:
        raise Refused("out of luck")

    monkeypatch.setattr(run, "copy_side_files", broken)
    case.refused(4, "out of luck", format="bf16", calibration=None)


def test_fp16_overflow(case, tmp_path):
    """Inf in an fp16 file where a merged weight is larger than 65504."""
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    shutil.copytree(case.zoo.adapter("llama"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: tensor * (1e5 if ".0.self_attn.q_proj.lora_B" in name else 1) for name, tensor in tensors.items()}
    tensors = {name: tensor * (1e3 if ".0.self_attn.q_proj.lora_A" in name else 1) for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    case.refused(4, "does not fit fp16", "q_proj", "--format bf16", format="fp16", calibration=None, adapter=adapter)


def test_nan_in_the_adapter(case, tmp_path):
    """A diverged fine-tune spread over a checkpoint."""
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    shutil.copytree(case.zoo.adapter("llama"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "1.mlp.up_proj.lora_B" in name)
    tensors[name][3, 1] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    for fmt, calibration in (("bf16", None), ("gptq", case.zoo.calibration)):
        case.refused(4, name, "1 NaN", format=fmt, calibration=calibration, adapter=adapter)


@pytest.fixture(scope="module")
def odd(zoo):
    """Llama with hidden 64 and feed-forward 172, as stories260k: groups and 32-packing do not divide."""
    from conftest import TARGETS, save_adapter, save_nf4

    source = zoo.float("llama", "feed-forward 172", hidden_size=64, intermediate_size=172, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    base = zoo._once("odd-nf4", lambda folder: save_nf4(source, folder, True))
    return source, base, zoo._once("odd-adapter", lambda folder: save_adapter(source, folder, base, 0.05, 1, target_modules=TARGETS["llama"]))


def test_odd_shapes_are_refused_where_they_do_not_fit(case, odd):
    """A crash in the packer after the solving, or a refusal that does not say what to use instead."""
    case.refused(4, "gptq cannot hold", "mlp.gate_proj", "[172, 64]", "--format nf4", base=odd[1], adapter=odd[2], group_size=32)


def test_odd_shapes_in_nf4(case, odd, written):
    """Blocks that run across rows solved, packed or read with another order: bitsandbytes must read the weights that the pipeline computed, and they keep the
    fine-tune. Evaluated dequantized, for bitsandbytes' CPU kernels do not take these shapes."""
    from oracles.dequantized import base_model, divergence, fill, load_public, loaded_weights, logits, separate_model
    from transformers import AutoModelForCausalLM

    source, base, adapter = odd
    out, weights = written("llama", "nf4", base=base, adapter=adapter)
    theirs = loaded_weights(load_public(str(out)))
    assert len(theirs) == 14
    for name, weight in theirs.items():
        assert (weight == weights[f"{name}.weight"]).all(), name
    ids = case.zoo.batch(8)
    wanted, solved = logits(separate_model(source, base, adapter), ids), logits(fill(AutoModelForCausalLM.from_pretrained(source, dtype="float32"), theirs), ids)
    assert divergence(wanted, solved) < 0.6 * divergence(wanted, logits(base_model(source, base), ids))
    from qmerge.quality.arms import load_candidate
    from qmerge.quality.plain import dense_weights

    measured = dense_weights(load_candidate("nf4", str(out)).model)
    assert all((measured[name] == weight).all() for name, weight in theirs.items())
