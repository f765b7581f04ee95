"""Do the factors in the file have the rank that the config says?"""

from __future__ import annotations

from qmerge.errors import Refused
from qmerge.store.adapter import AdapterFiles


def check_rank(source: AdapterFiles, a: str, b: str, rank: int) -> None:
    """Refused, naming the tensor, unless A is ``[rank, …]`` and B ``[…, rank]``, or a diagonal block of that (BD-LoRA)."""
    blocks = int((source.config.get("use_bdlora") or {}).get("nblocks", 1))
    for key, axis in ((a, 0), (b, 1)):
        spec = source.specs[key]
        where = f"tensor {key!r} in {source.name}"
        if len(spec.shape) != 2:
            raise Refused("Only LoRA on linear layers and embeddings can be merged.", where=where, expected="2 dimensions", found=list(spec.shape))
        if spec.shape[axis] != rank and not (axis == 1 and spec.shape[axis] * blocks == rank):
            raise Refused("An adapter tensor has another rank than the adapter's config says.", where=where,
                          expected=f"rank {rank} in dimension {axis}", found=f"shape {list(spec.shape)}", fix="take the config and the weights of one training run")
