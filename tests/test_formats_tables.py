"""Every table that lists formats knows each format that is written."""

from __future__ import annotations

import pytest
import torch

from qmerge.errors import UsageProblem
from qmerge.extras import LOADERS, packages
from qmerge.formats import BITS, BLOCK_SIZES, BUILT, QUANTIZING, registry
from qmerge.formats.integers import Layout
from qmerge.pipeline.recipe import Recipe, build_recipe
from qmerge.pipeline.recipe_values import FIXED
from qmerge.quality import arms, estimate
from qmerge.report import engines

EVERY = pytest.mark.parametrize("name", QUANTIZING)


def settings_of(name: str) -> dict:
    """The ``quantization_config`` of a model with one linear of that format."""
    recipe = Recipe(format=name, **FIXED.get(name, {}))
    return registry.of_format(name).config(Layout({"model.layers.0.a": recipe.grid}, ("lm_head",), "model.layers", "lm_head", str(torch.bfloat16).removeprefix("torch."), "1.0"))


def test_bits_and_blocks_make_up_what_quantizes():
    """A format of ``QUANTIZING`` without its bits in ``BITS``: it is then treated as one of bitsandbytes', and its manifest does not say its grid."""
    assert sorted((*BITS, *BLOCK_SIZES)) == sorted(QUANTIZING)


@EVERY
def test_a_checkpoint_is_known_by_its_config(name):
    """``quant_method`` another word than the format's name: the merge passes, and only verify fails, on a checkpoint that is written."""
    assert registry.of_settings(settings_of(name)).name == name


@EVERY
def test_what_is_written_can_be_measured_and_loaded(name):
    """`qmerge run` that merges for hours and is then refused by the evaluation; a model card without a word on how to load it, or without the packages."""
    method = settings_of(name)["quant_method"]
    assert method in arms.MEASURED and method in estimate.LOADERS
    for kind in (name, method):
        assert engines.loads("transformers", kind) and kind in engines.NAMES
        installed = engines.snippets(kind)[0][2].splitlines()[0].split()
        assert installed == ["#", "pip", "install", "torch", "transformers", "accelerate", *packages(*LOADERS[method])]


@pytest.mark.parametrize("name", FIXED)
def test_no_other_value_than_the_fixed_one(name):
    """A grid that the format's files cannot say: accepted, packed, and read back as another one."""
    for setting, value in FIXED[name].items():
        with pytest.raises(UsageProblem, match=f"format {name} "):
            build_recipe(None, (), {"base": "b", "adapter": ("a",), "out": "o", "format": name, setting: not value if isinstance(value, bool) else 5})


def test_the_help_names_every_format():
    """A format that only those find who read the code."""
    from qmerge.cli.main import cli

    said = next(option.help for option in cli.commands["merge"].params if option.name == "format")
    assert [word.removesuffix(" (default)") for word in said.rstrip(".").split(", ")] == list(BUILT)
