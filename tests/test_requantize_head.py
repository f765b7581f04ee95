"""The output head, requantized after the last block from what it receives in both streams, and read by the public loaders."""

from __future__ import annotations

import pytest
import torch
from conftest import KINDS
from oracles.dequantized import divergence, fill, logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qmerge.numerics.hessian import Statistics
from qmerge.pipeline.blocks import record_calls, run_block
from qmerge.pipeline.head import Tail, _as_stored
from qmerge.pipeline.requantize import Linear, requantize_group
from qmerge.pipeline.skeleton import describe
from qmerge.quality.arms import load_candidate
from qmerge.quality.plain import dense_weights
from qmerge.types import Grid

pytest.importorskip("gptqmodel")
pytest.importorskip("compressed_tensors")
FORMATS = pytest.mark.parametrize("fmt", ["compressed-tensors", "nf4", "fp4", "gptq"])
HEAD = "lm_head.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_blocks_is_the_models_own(zoo, kind):
    """A final norm, a scaling or a soft cap that is skipped or run twice, and windows mixed up: from the last block's output on, logits must be the model's."""
    model = AutoModelForCausalLM.from_pretrained(zoo.float(kind), dtype=torch.float32).eval()
    skeleton = describe(model, kind)
    ids = zoo.batch(3)
    hidden, calls = record_calls(model, skeleton.blocks_name, [ids])
    states = hidden[0]
    for index, block in enumerate(skeleton.blocks):
        states = run_block(block, states, calls[0][index])
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    wanted = logits(model, ids)
    handle.remove()
    with torch.no_grad(), Tail(skeleton) as tail:
        received, found = tail.logits(states)
        alone = tail.head_input(states)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(received, seen[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(alone, received) and torch.equal(logits(model, ids), wanted)  # the blocks are back in place


def test_gradients_pass(zoo):
    """A tail that cuts the gradient off: the budget's losses would be zero or wrong. Against autograd through the whole model."""
    model = AutoModelForCausalLM.from_pretrained(zoo.float("llama"), dtype=torch.float32).eval().requires_grad_(False)
    skeleton, ids, states = describe(model, "llama"), zoo.batch(1), []
    handle = skeleton.blocks[-1].register_forward_hook(lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.enable_grad():
        entrance = model.get_input_embeddings()(ids).requires_grad_()
        out = model(inputs_embeds=entrance, use_cache=False).logits.log_softmax(-1)[0, :, 7].sum()
        wanted = torch.autograd.grad(out, states[0])[0]
        handle.remove()
        leaf = states[0].detach().requires_grad_()
        with Tail(skeleton) as tail:
            found = torch.autograd.grad(tail.logits(leaf)[1].log_softmax(-1)[0, :, 7].sum(), leaf)[0]
    torch.testing.assert_close(found, wanted)


@FORMATS
def test_the_public_loader_reads_the_head(zoo, written, fmt):
    """A head that is solved and left out of the file, read from another tensor, or left at random. Weights bit for bit; logits of the same weights."""
    out, weights = written("llama", fmt, "--quantize-head")
    arm = load_candidate("d", str(out))
    found = dense_weights(arm.model)
    assert (
        len(weights) == 15
        and HEAD in weights
        and HEAD not in load_file(out / "model.safetensors").keys() - {HEAD if fmt in ("nf4", "fp4") else ""}
    )
    for name, weight in weights.items():
        assert torch.equal(found[name.removesuffix(".weight")], weight), name
    ids = zoo.batch()
    wanted = logits(
        fill(
            AutoModelForCausalLM.from_pretrained(zoo.float("llama"), dtype=torch.float32),
            {name.removesuffix(".weight"): weight for name, weight in weights.items()},
        ),
        ids,
    )
    assert float((logits(arm.model, ids) - wanted).norm() / wanted.norm()) < 1e-6


@FORMATS
def test_verify_reads_the_head_back(zoo, written, cli, fmt):
    """A head without a record in the manifest, or recorded other than it is."""
    out, _ = written("llama", fmt, "--quantize-head")
    answer = cli("verify", out, "--base", zoo.nf4("llama"), "--adapter", zoo.adapter("llama"))
    assert answer.code == 0, answer.out + answer.err


@FORMATS
def test_the_blocks_are_those_without_it(written, fmt):
    """A head that changes what comes before it: blocks are solved first, from the same streams."""
    with_head, without = written("llama", fmt, "--quantize-head")[1], written("llama", fmt)[1]
    assert set(with_head) - set(without) == {HEAD}
    assert all(torch.equal(with_head[name], weight) for name, weight in without.items())


@pytest.mark.parametrize("fmt", ["compressed-tensors", "nf4"])
def test_solved_beats_rounded(zoo, written, fmt):
    """Statistics of another place than the head's input: solved on those it would be no better than rounded. KL on text not seen, all else equal."""
    weights, rounded = written("llama", fmt, "--quantize-head")[1], written("llama", fmt, "--quantize-head", "--rtn")[1]
    model = AutoModelForCausalLM.from_pretrained(zoo.float("llama"), dtype=torch.float32)
    blocks, ids = {name.removesuffix(".weight"): weight for name, weight in weights.items() if name != HEAD}, zoo.batch(8)
    kept = model.lm_head.weight.data.clone()
    wanted = logits(fill(model, blocks | {"lm_head": kept}), ids)
    found = [divergence(wanted, logits(fill(model, {"lm_head": head}), ids)) for head in (weights[HEAD], rounded[HEAD])]
    assert found[0] < 0.8 * found[1], found


def test_the_head_aims_at_the_teacher(zoo):
    """A head solved on run-time inputs alone: where the two streams differ it must answer the run-time input as it answered the teacher's."""
    torch.manual_seed(0)
    weight, teacher = 0.1 * torch.randn(96, 64), torch.randn(2048, 64)
    runtime = teacher + 0.3 * teacher @ torch.randn(64, 64) / 8
    sums = [Statistics(64), Statistics(64)]
    for number, part in enumerate((slice(0, 1792), slice(1792, 2048))):
        sums[number].add(runtime[part], teacher[part])
    solved = requantize_group([Linear("h", weight, None)], Grid("int", 8, 32, least_zero=0), *sums, torch.bfloat16)[0]
    ours, plain = ((runtime @ found.T - teacher @ weight.T).norm() for found in (solved.weight, weight))
    assert ours < 0.2 * plain and solved.choice.own_shift == 1.0


def test_what_lies_around_the_blocks_is_rounded_as_the_file_holds_it(zoo):
    """A final norm in fp32, where the file holds it in bf16: the head would be solved for inputs that it never gets. Embeddings and the head are not its business."""
    model = AutoModelForCausalLM.from_pretrained(zoo.float("llama"), dtype=torch.float32).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.001)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    _as_stored(describe(model, "llama"), torch.bfloat16)
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"].bfloat16().float()) and not torch.equal(
        model.model.norm.weight, before["model.norm.weight"]
    )
    assert torch.equal(model.lm_head.weight, before[HEAD]) and torch.equal(
        model.model.embed_tokens.weight, before["model.embed_tokens.weight"]
    )
