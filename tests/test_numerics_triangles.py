"""Is the root of an inverse right, and found in the memory of one matrix?"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qmerge.numerics.triangles import inverse_root

MEASURED = """
import resource, torch
from qmerge.numerics.hessian import factor
def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = 2400
found = torch.randn(64, size)
factor(found[:, :300].T @ found[:, :300], 0.1)  # what the libraries load on their first call
hessian = found.T @ found / 64
before = most()
factor(hessian, 0.1)
print((most() - before) / size**2)
"""


@pytest.mark.parametrize("size", [1, 7, 128, 129, 700, 1301])
def test_the_root_is_upper_triangular_and_squares_to_the_inverse(size):
    """Halves or strips that meet at the wrong row: right for one leaf, and for no larger matrix."""
    torch.manual_seed(size)
    draw = torch.randn(size, size + 5, dtype=torch.float64)
    matrix = draw @ draw.T + torch.eye(size, dtype=torch.float64)
    upper = inverse_root(matrix)
    assert torch.equal(upper, torch.triu(upper))
    torch.testing.assert_close(upper.T @ upper @ matrix, torch.eye(size, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_no_root_of_what_is_not_positive_definite():
    """A damping that is never raised, because a failed factorization looks like a result."""
    assert inverse_root(torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))) is None


def test_a_factor_takes_one_matrix_in_fp64_and_its_own():
    """A copy on the way: eight bytes more per element, gigabytes where inputs are wide. 12 is what must be there; the rest is for strips."""
    found = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 17, found.stdout
