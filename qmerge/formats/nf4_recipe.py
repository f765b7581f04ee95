"""How was a float base quantized to 4 bits while the adapter was trained? The answer as a value; `training.py` finds it, `fly.py` repeats it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qmerge.errors import UsageProblem


@dataclass(frozen=True)
class Nf4Recipe:
    """How a float base was quantized to 4 bits. ``dtype`` is the dtype of the weights at that moment (None: as the file holds them).

    ``skip`` are the modules that ``llm_int8_skip_modules`` left float, empty where nothing was said (then transformers leaves the output head).
    ``quant_type`` is ``nf4`` or ``fp4``.
    """

    block_size: int = 64
    double_quant: bool = True
    dtype: str | None = None
    skip: tuple[str, ...] = ()
    quant_type: str = "nf4"

    def to_json(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "double_quant": self.double_quant, "dtype": self.dtype, "skip": list(self.skip), "quant_type": self.quant_type}

    def skips(self, module: str) -> bool:
        """Whether ``skip`` names ``module``, by transformers' rule: a pattern matches from the start up to a dot or the end, or is how the name ends."""
        try:
            return any(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(pattern) for pattern in self.skip)
        except re.error as problem:
            raise UsageProblem("a pattern of llm_int8_skip_modules is no regular expression", found=f"{problem.pattern!r}: {problem.msg}", fix="correct it: names of modules, or regular expressions of them") from problem
