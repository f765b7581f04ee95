"""The calibrated requantizing path on tiny models of many architectures: the loader reads what was solved, and what was solved is better than rounding, linear by linear."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Zoo, run_cli, save_float, save_nf4
from oracles.dequantized import base_model, divergence, fill, logits
from safetensors.torch import load_file
from support.architectures import REQUANTIZED, requantized_config
from support.bases import save_moving_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from qmerge.quality.arms import load_candidate
from qmerge.quality.plain import round_trip_nf4

pytest.importorskip("gptqmodel")
CALIBRATED = ("--samples", "24", "--tokens", "64")
GROUP = 32
ROUTED = ("mixtral", "qwen3_moe", "qwen3_next", "gpt_oss")
EXPERT = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
FEW_INPUTS = {"opt-projected": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
"""what the adapter is on where it may not be on everything: nf4 keeps linears outside the blocks as they are stored"""


@dataclass(frozen=True)
class Inputs:
    base: str
    floats: str
    adapter: str


@dataclass(frozen=True)
class Output:
    folder: Path
    weights: dict[str, torch.Tensor]
    said: str


class Shop:
    """Bases, adapters and outputs by architecture, each made when first asked for."""

    def __init__(self, root: Path, zoo: Zoo) -> None:
        self.root, self.zoo, self._inputs, self._outputs, self._models = root, zoo, {}, {}, {}

    def inputs(self, key: str) -> Inputs:
        if key not in self._inputs:
            floats = save_float(self.root / key / "float", requantized_config(key))
            base = save_nf4(floats, self.root / key / "nf4", True)
            targets = {"target_modules": FEW_INPUTS[key]} if key in FEW_INPUTS else {}
            self._inputs[key] = Inputs(base, floats, save_moving_adapter(floats, self.root / key / "adapter", base, **targets))
        return self._inputs[key]

    def merged(self, key: str) -> nn.Module:
        """PEFT's own merge in fp32: what a requantized model should answer."""
        if key not in self._models:
            from peft import PeftModel

            found = self.inputs(key)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._models[key] = PeftModel.from_pretrained(base_model(found.floats, found.base), found.adapter).merge_and_unload().eval()
        return self._models[key]

    def output(self, key: str, fmt: str, *flags: str, base: str | None = None, text: str | None = None) -> Output:
        asked = (key, fmt, flags, base, text)
        if asked not in self._outputs:
            self._outputs[asked] = self._write(key, fmt, flags, base, text)
        return self._outputs[asked]

    def _write(self, key: str, fmt: str, flags: tuple[str, ...], base: str | None, text: str | None) -> Output:
        from qmerge.pipeline import tensors

        found, weights, inner = self.inputs(key), {}, tensors.to_pack
        out = self.root / key / f"out-{len(self._outputs)}"

        def to_pack(solved: Any) -> Any:
            weights.update({name: result.weight for name, result in solved.items()})
            return inner(solved)

        group = () if fmt in ("nf4", "fp4") else ("--group-size", GROUP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "to_pack", to_pack)
            answer = run_cli("merge", "--base", base or found.base, "--adapter", found.adapter, "--out", out, "--format", fmt, "--device", "cpu", "--calibration", text or self.zoo.calibration,
                             *group, *CALIBRATED, *flags)  # fmt: skip
        assert answer.code == 0, answer.err
        return Output(out, weights, answer.err)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, zoo: Zoo) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"), zoo)


def public(folder: Path) -> nn.Module:
    """As its public loader reads it, each linear as that loader dequantizes it, in fp32."""
    return load_candidate("d", str(folder)).model


def expert_slice(model: nn.Module, name: str) -> torch.Tensor | None:
    """Where a per-expert weight lies in today's fused parameters, as a view ``[out, in]``; None for other names."""
    match = EXPERT.fullmatch(name.replace("block_sparse_moe", "mlp"))
    if match is None:
        return None
    experts = model.get_submodule(match[1])
    if match[3] in ("down_proj", "w2"):
        return experts.down_proj.data[int(match[2])]
    half = experts.gate_up_proj.shape[1] // 2
    return experts.gate_up_proj.data[int(match[2])][slice(0, half) if match[3] in ("gate_proj", "w1") else slice(half, None)]


def put(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """``model`` with linears and single experts set to ``weights``."""
    routed = {name for name in weights if expert_slice(model, name) is not None}
    for name in routed:
        expert_slice(model, name).copy_(weights[name])
    return fill(model, {name.removesuffix(".weight"): weight for name, weight in weights.items() if name not in routed})


def filled(shop: Shop, key: str, fmt: str, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The merged model with these weights. Others are floats in the file's dtype, but that nf4 keeps linears outside the blocks as the base holds them."""
    model = copy.deepcopy(shop.merged(key))
    for parameter in model.parameters():
        if parameter.dim() == 3 or fmt != "nf4":
            parameter.data = parameter.data.bfloat16().float()
    return put(model, weights)


def merged_weight(model: nn.Module, name: str) -> torch.Tensor:
    found = expert_slice(model, name)
    if found is not None:
        return found
    module = model.get_submodule(name.removesuffix(".weight"))
    return module.weight.data.T.contiguous() if isinstance(module, Conv1D) else module.weight.data


def rounded(weight: torch.Tensor, fmt: str) -> torch.Tensor:
    """Nearest values of the same grid: bitsandbytes' own NF4, or int4 in groups with searched scales."""
    from qmerge.pipeline.requantize import Linear, round_to_nearest
    from qmerge.types import Grid

    return round_trip_nf4(weight, 64, True) if fmt == "nf4" else round_to_nearest(Linear("w", weight, None), Grid("int", 4, GROUP), torch.bfloat16).weight


def inputs_of(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Linear's weight name -> what it receives, ``[tokens, in]``."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(f"{name}.weight", args[0].reshape(-1, args[0].shape[-1])))
        for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    ]  # fmt: skip
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def gradients_of(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Linear's weight name -> gradients ``[tokens, out]`` of the log-likelihood of labels drawn from the model itself, by what the linear gives out; the whole model at once."""
    found: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def after(_: nn.Module, args: tuple, out: torch.Tensor) -> None:
            out.register_hook(lambda g: found.setdefault(f"{name}.weight", []).append(g.reshape(-1, g.shape[-1])))

        return after

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    draws = torch.Generator().manual_seed(0)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with torch.enable_grad():
        model.requires_grad_(True)
        for _ in range(4):
            logs = model(input_ids=ids).logits.float().log_softmax(-1).flatten(0, 1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=draws)
            torch.autograd.grad(logs.gather(1, labels).sum(), model.get_input_embeddings().weight)
    for handle in handles:
        handle.remove()
    for parameter, flag in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(flag)
    return {name: torch.cat(parts) for name, parts in found.items()}


def metric(gradients: torch.Tensor | None, outputs: int) -> torch.Tensor:
    """How errors of a linear's outputs count together; one by one where nothing was measured (a routed expert)."""
    if gradients is None:
        return torch.eye(outputs)
    whole = gradients.T @ gradients
    return whole + 0.1 * whole.diagonal().mean() * torch.eye(outputs)


def adapted(adapter: str) -> set[str]:
    """Linears that the adapter changes: in NF4 others are on the base's grid already, where rounding has no error."""
    keys = load_file(Path(adapter) / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight" for key in keys}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# every architecture in one of the formats; the other one is slow
EVERY = pytest.mark.parametrize(("key", "fmt"), [
    pytest.param(key, fmt, id=f"{key}-{fmt}", marks=() if number % 2 == turn or key == "llama" else pytest.mark.slow)
    for number, key in enumerate(REQUANTIZED) for turn, fmt in enumerate(("gptq", "nf4"))
])  # fmt: skip


@EVERY
def test_loader_reads_what_was_solved(shop, zoo, key, fmt):
    """A weight that the public loader reads otherwise than it was solved, leaves at random or does not find; a tied, projected or fused part lost on the way."""
    made = shop.output(key, fmt)
    ids = zoo.batch()
    assert distance(logits(public(made.folder), ids), logits(filled(shop, key, fmt, made.weights), ids)) < 1e-4


@EVERY
def test_every_linear_is_solved_and_the_model_answers_better(shop, zoo, key, fmt):
    """A linear that was only rounded, or solved on another linear's inputs, in whatever layer it sits. On text not seen, what each linear makes of the inputs that it really gets must
    be nearer to what the merged one makes of its own than plain rounding on the same grid is, weighed by what the whole model's gradients say of errors that cancel, and so must the
    model's logits. Routers that decide otherwise blur both."""
    made, ids, merged, routed = shop.output(key, fmt), zoo.batch(8), shop.merged(key), key in ROUTED
    model, linears = filled(shop, key, fmt, made.weights), [name for name in made.weights if name in adapted(shop.inputs(key).adapter)]
    nearest = {name: rounded(merged_weight(merged, name), fmt) for name in made.weights}
    own, received, worse = inputs_of(merged, ids), inputs_of(model, ids), {}
    gradients = gradients_of(merged, ids)
    for name in linears:
        aim = merged_weight(merged, name) @ own[name].T
        weigh = metric(gradients.get(name), len(aim))
        solved, plain = (float((weigh @ error * error).sum()) for error in (weight @ received[name].T - aim for weight in (made.weights[name], nearest[name])))
        worse |= {name: solved / plain}
        assert float((made.weights[name] != nearest[name]).float().mean()) > 0.02, name
    ratios = sorted(worse.values())
    assert len(linears) >= 6 and ratios[len(ratios) // 2] < (1.0 if routed else 0.85), worse
    assert ratios[-1] < (1.1 if routed else 1.0 if fmt == "gptq" else 1.3), worse
    wanted = logits(merged, ids)
    solved, plain = (divergence(wanted, logits(filled(shop, key, fmt, weights), ids)) for weights in (made.weights, nearest))
    assert solved < (0.9 if routed else 0.6) * plain, (solved, plain)


def test_gates_stay_float_and_the_plan_says_so(shop):
    """A gate of a shared expert or of heads packed, where gptqmodel and vLLM look for a float one and leave it at random."""
    made = shop.output("qwen3_next", "gptq")
    kept = {"model.layers.0.mlp.shared_expert_gate.weight", "model.layers.0.linear_attn.in_proj_ba.weight"}
    assert "linears with few outputs stay float" in made.said and not kept & set(made.weights)
    assert kept <= set(load_file(made.folder / "model.safetensors"))


def test_adapted_linear_outside_the_blocks_is_refused_in_nf4(shop, tmp_path):
    """OPT's projections, which calibration does not reach, rounded to nearest without a word."""
    found = shop.inputs("opt-projected")
    adapter = save_moving_adapter(found.floats, tmp_path / "adapter", found.base)
    answer = run_cli("merge", "--base", found.base, "--adapter", adapter, "--out", tmp_path / "out", "--format", "nf4", "--device", "cpu", "--calibration", shop.zoo.calibration, *CALIBRATED)
    assert answer.code == 4 and "model.decoder.project_out" in answer.err and not (tmp_path / "out").exists()


@EVERY
def test_verify_finds_everything_in_place(shop, cli, key, fmt):
    """A whole file called incomplete: fused experts that it holds one by one, projections or heads under other names."""
    answer = cli("verify", shop.output(key, fmt).folder, "--base", shop.inputs(key).base, "--adapter", shop.inputs(key).adapter)
    assert answer.code == 0, answer.out + answer.err
