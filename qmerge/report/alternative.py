"""Is NF4 the 4-bit file to look at instead, or as well? A sentence where a careful reader of these results would think of it, else nothing."""

from __future__ import annotations

from qmerge.report import fields
from qmerge.report.advice import by_kl
from qmerge.report.clean import clean
from qmerge.report.engines import loads
from qmerge.report.fields import Results

INTS = ("gptq", "awq", "compressed-tensors")
NF4 = ("bitsandbytes", "nf4")
FOR = "it loads with bitsandbytes, also to be trained on again (QLoRA)"


def nf4_instead(results: Results, shipped: str | None, engine: str | None = None) -> str:
    """``shipped``: the arm whose file is advised, None where every candidate failed. One sentence, names cleaned; empty where NF4 is no answer: it is what is advised, the engine does not load it,
    what failed or is shipped is no int format, or NF4 was measured and does not pass."""
    names = [name for name in fields.candidate_names(results) if name not in fields.FOR_COMPARISON]
    kinds = {name: str(fields.one_arm(results, name).get("kind")) for name in names}
    if (engine and not loads(engine, "nf4")) or not any(kinds.get(name) in INTS for name in ([shipped] if shipped else names)):
        return ""
    if measured := by_kl(results, [name for name in names if kinds[name] in NF4]):
        passing = [name for name in measured if fields.candidate_state(results, name) == "pass"]
        return f"{clean(passing[0])} (NF4) holds the budget too: {FOR}." if passing else ""
    if shipped:
        return f"The other 4-bit file, not measured here, is --format nf4: {FOR}."
    return "NF4 was not measured: --format nf4 takes as many bits and usually loses less; try it before giving up on 4 bits."
