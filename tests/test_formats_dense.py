"""Float files: one cast, and no overflow unsaid."""

from __future__ import annotations

import pytest
import torch

from qmerge.errors import Refused
from qmerge.formats import dense


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "fp32"])
def test_one_cast(fmt):
    """A second rounding on the way."""
    weight = torch.randn(8, 16)
    assert torch.equal(dense.cast("w", weight, dense.DTYPES[fmt]), weight.to(dense.DTYPES[fmt]))


def test_overflow_is_refused_with_a_format_that_fits():
    """Inf written to an fp16 file."""
    with pytest.raises(Refused, match="bf16") as caught:
        dense.cast("layer.weight", torch.tensor([[1.0, 7e4]]), torch.float16)
    assert "layer.weight" in str(caught.value) and "70000" in str(caught.value)
    assert dense.cast("layer.weight", torch.tensor([[1.0, 7e4]]), torch.bfloat16).isfinite().all()


def test_nan_is_not_called_overflow():
    """NaN in a weight explained by a format that is too narrow."""
    with pytest.raises(Refused, match="not finite"):
        dense.cast("w", torch.tensor([float("nan")]), torch.bfloat16)
