"""qmerge: one 4-bit checkpoint that keeps a QLoRA fine-tune, with the evidence of what merging cost.

In Python: `qmerge.merge`, `qmerge.evaluate`, `qmerge.compare`, `qmerge.load_results`, `qmerge.inspect`, `qmerge.verify`; errors are in `qmerge.errors`. They are the commands of the same names,
with typed values instead of text. The names are fetched when they are first used: ``import qmerge`` reads this file alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not run this file
    from qmerge.api import (
        ArmResult,
        CheckResult,
        EvalResult,
        LimitCheck,
        MergeResult,
        Metric,
        Verdict,
        Verification,
        compare,
        evaluate,
        inspect,
        load_results,
        merge,
        verify,
    )

__version__ = "0.1.0"
__all__ = ["ArmResult", "CheckResult", "EvalResult", "LimitCheck", "MergeResult", "Metric", "Verdict", "Verification", "__version__", "compare", "evaluate", "inspect", "load_results", "merge", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qmerge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("qmerge.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
