"""What can a Python program ask qmerge to do? The functions that the commands call too, and the frozen values that they give.

A name here is reached as ``qmerge.NAME`` too. Importing this imports no torch.
"""

from qmerge.api.judging import compare
from qmerge.api.looking import inspect, verify
from qmerge.api.measuring import evaluate, load_results
from qmerge.api.merging import merge
from qmerge.api.values import ArmResult, CheckResult, EvalResult, LimitCheck, MergeResult, Verdict, Verification
from qmerge.types import Metric

__all__ = ["ArmResult", "CheckResult", "EvalResult", "LimitCheck", "MergeResult", "Metric", "Verdict", "Verification", "compare", "evaluate", "inspect", "load_results", "merge", "verify"]
