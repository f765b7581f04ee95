"""Is each named perplexity the number of the tool that it is named after, to the digit that the tool prints?"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from oracles import perplexity_slow as slow

from qmerge.errors import Refused, UsageProblem
from qmerge.quality import measure, perplexity
from qmerge.quality.asked import DEFAULTS, Request, parse_requests
from qmerge.quality.compare import compare, load_budget
from qmerge.quality.perplexity import Perplexities, metrics, window_losses
from qmerge.quality.protocols import context_length, plan, read_request
from qmerge.quality.reference import Answers

CONTEXT = 64
DOCUMENTS = [" ".join(f"{(7 * d + 3) * i % 101} birds saw the {('old', 'tall', 'green')[(d + i) % 3]} tree" for i in range(6 + 3 * d)) + "\n é" for d in range(6)]
WORDS = ["<s>", "</s>", "<unk>", *sorted({word for text in DOCUMENTS for word in text.split()})]
GOLDEN = {
    "gptq,tokens=32": {"ppl": "107.8707"},
    "strided,tokens=48,stride=20": {"ppl": "112.5254"},
    "llama.cpp,tokens=32": {"ppl": "116.7853"},
    "lm-eval,tokens=40": {"word_ppl": "128.2762", "byte_ppl": "2.9729", "bits_per_byte": "1.5719"},
}
"""Made with tests/oracles/perplexity_slow.py on `tiny_model`, `tiny_tokenizer` and DOCUMENTS (joined by an empty line but for lm-eval), fp32 weights
on a CPU, printed with four decimals as llama.cpp and lm-eval print; lm-eval 0.4.13 itself gives the last three."""


def tiny_model(vocabulary=None):
    """A Llama whose weights are sines of their place: the same everywhere, without a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocabulary or len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            place = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            parameter.copy_(0.3 * torch.sin(place * place * 0.37 + 1.7 * place + number) + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def tiny_tokenizer(bos=True):
    """One token per word; BOS by itself, as Llama's tokenizers do, unless ``bos`` is False."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "wiki.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def cut_for(model, how, file, tokenizer=None):
    [request] = parse_requests([f"{how}:{file}"]).values()
    return plan(request, read_request(request), tokenizer or tiny_tokenizer(), context_length(model.config))


def measured(model, how, file, tokenizer=None):
    """Our numbers under one protocol, printed."""
    cut = cut_for(model, how, file, tokenizer)
    sums = window_losses(Answers(model), cut, "cpu")
    return {name: f"{metric.value:.4f}" for name, metric in metrics(cut, sums, sums).items() if name != "ratio"}


def oracle(model, how, tokenizer=None):
    """The slow tools' numbers, printed."""
    request = Request(how.split(",")[0], {key: int(value) for key, value in (pair.split("=") for pair in how.split(",")[1:])}, "")
    tokenizer, size = tokenizer or tiny_tokenizer(), request.settings["tokens"]
    ids = list(tokenizer("\n\n".join(DOCUMENTS))["input_ids"])
    with torch.no_grad():
        if request.protocol == "gptq":
            found = {"ppl": slow.gptq(model, ids, size)}
        elif request.protocol == "strided":
            found = {"ppl": slow.strided(model, ids, size, request.settings["stride"])}
        elif request.protocol == "llama.cpp":
            found = {"ppl": slow.llama_cpp(model, ids, size, 0 if ids[0] == 0 else None)}
        else:
            found = dict(zip(("word_ppl", "byte_ppl", "bits_per_byte"), slow.lm_eval(model, DOCUMENTS, tokenizer, 0, size), strict=True))
    return {name: f"{value:.4f}" for name, value in found.items()}


@pytest.mark.parametrize("how", GOLDEN)
def test_protocols_print_their_tools_digits(how, model, file):
    """A window shifted by one, a border token scored, another average: each is a number that nobody can compare with a paper."""
    assert measured(model, how, file) == oracle(model, how) == GOLDEN[how]


def test_rolling_perplexity_is_lm_evals_own(model, file, tmp_path):
    """The oracle and ours could share a misreading of lm-eval; the library cannot."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "task": "tiny_rolling", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test", "output_type": "loglikelihood_rolling",
        "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }  # fmt: skip
    (tmp_path / "tiny_rolling.yaml").write_text(yaml.safe_dump(task))
    lm = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), max_length=40, softmax_dtype="float32", batch_size=4)
    found = lm_eval.simple_evaluate(model=lm, tasks=["tiny_rolling"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0)
    row = found["results"]["tiny_rolling"]
    printed = {ours: f"{row[f'{theirs},none']:.4f}" for ours, theirs in (("word_ppl", "word_perplexity"), ("byte_ppl", "byte_perplexity"), ("bits_per_byte", "bits_per_byte"))}
    assert printed == GOLDEN["lm-eval,tokens=40"]


def test_llama_cpp_puts_no_bos_where_the_tokenizer_has_none(model, file):
    """A token of the text overwritten by a BOS that the model never saw there; and the other way round the number is another one."""
    how = "llama.cpp,tokens=32"
    plain = tiny_tokenizer(bos=False)
    assert measured(model, how, file, plain) == oracle(model, how, plain) != measured(model, how, file)


@pytest.mark.parametrize("how", GOLDEN)
def test_windows_alone_and_together_lose_the_same(how, model, file, monkeypatch):
    """Batches that mix up their rows, or chunks that drop the last positions."""
    cut = cut_for(model, how, file)
    together = window_losses(Answers(model), cut, "cpu")
    monkeypatch.setattr(measure, "BATCH_TOKENS", 1), monkeypatch.setattr(perplexity, "CHUNK_BYTES", 5 * 4 * len(WORDS))
    np.testing.assert_allclose(window_losses(Answers(model), cut, "cpu"), together, rtol=2e-6)


def test_ratio_is_paired_by_window(model, file):
    """Two intervals laid side by side are far wider than the interval of their difference."""
    with torch.no_grad():
        other = tiny_model()
        other.lm_head.weight += 0.01
        other.model.norm.weight *= 1.02
    cut = cut_for(model, "gptq,tokens=32", file)
    ours, theirs = (window_losses(Answers(each), cut, "cpu") for each in (other, model))
    found = metrics(cut, ours, theirs)
    alone = metrics(cut, theirs, theirs)
    assert found["ratio"].value == pytest.approx(found["ppl"].value / alone["ppl"].value, rel=1e-12)
    delta = (ours - theirs) / 31
    half = 2.144786687916925 * delta.std(ddof=1) / math.sqrt(len(delta))  # Student's t for 14 degrees of freedom
    assert math.log(found["ratio"].ci_high) == pytest.approx(delta.mean() + half, rel=1e-9)
    assert found["ratio"].ci_high / found["ratio"].ci_low < (found["ppl"].ci_high / found["ppl"].ci_low) ** 0.2
    assert alone["ratio"].ci_low == alone["ratio"].ci_high == 1.0 and found["ppl"].n == 15 * 31


def test_non_finite_losses_leave_the_perplexity_undefined(model, file):
    """A mean over what is left would be a number under the protocol's name that the protocol does not give."""
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[WORDS.index("old")] = torch.nan
    measures = Perplexities({"gptq,tokens=32:wiki": cut_for(model, "gptq,tokens=32", file)})
    measures.add("separate", Answers(model), "cpu", lambda label: None), measures.add("x", Answers(broken), "cpu", lambda label: None)
    row = measures.row("x")["gptq,tokens=32:wiki"]
    assert row["protocol"] == "gptq" and row["metrics"]["ppl"]["value"] is None is row["metrics"]["ratio"]["value"] and "not finite" in row["metrics"]["ppl"]["note"]
    assert measures.row("separate")["gptq,tokens=32:wiki"]["metrics"]["ppl"]["value"] > 1


def test_unlike_protocols_are_not_compared(model, file, tmp_path):
    """A baseline of another window, or of a text with one letter changed under the same name, looks like a gain or a loss."""
    def results(how, path):
        return {"fingerprint": {"perplexity": Perplexities({"wiki": cut_for(model, how, path)}).fingerprint}, "arms": {}}

    (tmp_path / "wiki.jsonl").write_text(file.read_text().replace("birds", "bords", 1))
    budget = load_budget("default")
    assert compare(results("gptq", file), budget, results("gptq", file))["state"] == "inconclusive"  # no candidates: but comparable
    for other in (results("gptq,tokens=32", file), results("strided", file), results("gptq", tmp_path / "wiki.jsonl")):
        with pytest.raises(Refused, match="not measured the same way"):
            compare(other, budget, results("gptq", file))


def test_windows_stay_inside_the_models_context(model, file):
    """Positions that a model was not made for; and a default that silently is not what its fingerprint says."""
    for how, tokens in (("gptq", CONTEXT), ("strided", CONTEXT), ("llama.cpp", CONTEXT), ("lm-eval", CONTEXT)):
        cut = cut_for(model, how, file)
        assert cut.settings["tokens"] == tokens and max(len(ids) - 1 for ids in cut.ids) <= CONTEXT
    assert cut_for(model, "strided", file).settings["stride"] == CONTEXT // 2
    with pytest.raises(UsageProblem, match="longer than the model's context"):
        plan(Request("gptq", {"tokens": 65}, "wiki.txt"), DOCUMENTS, tiny_tokenizer(), CONTEXT)
    assert context_length(object(), tiny_tokenizer()) == 2048


@pytest.mark.parametrize("how", ["gptq", "llama.cpp", "strided"])
def test_a_text_that_fills_no_window_is_refused(how):
    """0 windows: a division by 0, or a perplexity of 1."""
    with pytest.raises(Refused, match="too short"):
        plan(Request(how, {}, "wiki.txt"), ["" if how == "strided" else "birds"], tiny_tokenizer(), CONTEXT)


@pytest.mark.parametrize("text", ["wiki.txt", "gptq=wiki.txt", "gptq:", "gtpq:wiki.txt", "gptq,stride=4:wiki.txt", "gptq,tokens=x:wiki.txt", "gptq,tokens=1:wiki.txt", "gptq,tokens=64,tokens=64:wiki.txt"])
def test_malformed_requests_say_what_is_meant(text):
    """A protocol misspelt, or a setting ignored, gives a number under a wrong name."""
    with pytest.raises(UsageProblem) as error:
        parse_requests([text])
    assert any(word in str(error.value) for word in ("gptq:wiki.txt", "strided", "tokens=N", "whole number"))


def test_empty_rows_are_part_of_a_joined_text(tmp_path):
    """WikiText-2 from the hub has an empty row between paragraphs; without them its joined text, and its perplexity, is another."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "", "b")))
    for how, texts in (("gptq", ["a", "", "b"]), ("strided", ["a", "", "b"]), ("llama.cpp", ["a", "", "b"]), ("lm-eval", ["a", "b"])):
        assert read_request(Request(how, {}, str(tmp_path / "rows.jsonl"))) == texts
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": ""}))
    with pytest.raises(Refused, match="no documents"):
        read_request(Request("gptq", {}, str(tmp_path / "rows.jsonl")))


def test_labels_name_protocol_and_file_and_no_folder():
    """A folder of the machine in results that people publish; two files under one label."""
    assert list(parse_requests(["gptq:/home/somebody/wiki text.txt", "strided,stride=128:/x/wiki.txt"])) == ["gptq:wiki-text", "strided,stride=128:wiki"]
    with pytest.raises(UsageProblem, match="same name"):
        parse_requests(["gptq:a/wiki.txt", "gptq:b/wiki.txt"])
    assert set(DEFAULTS) == {"gptq", "strided", "llama.cpp", "lm-eval"}
