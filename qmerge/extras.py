"""Which extra of qmerge brings a package that not everybody needs, and is it here?"""

from __future__ import annotations

import importlib.util

from qmerge.errors import UsageProblem

BROUGHT_BY = {
    "gptqmodel": "gptq", "optimum": "gptq", "compressed_tensors": "compressed", "lm_eval": "eval", "model_signing": "sign", "OpenSSL": "sign",
    "nbformat": "notebook", "nbclient": "notebook", "nbconvert": "notebook", "ipykernel": "notebook",
}  # fmt: skip
"""module -> the extra in pyproject.toml"""

SHOWN = {"compressed_tensors": "compressed-tensors", "lm_eval": "lm-eval", "model_signing": "model-signing", "OpenSSL": "pyOpenSSL"}
"""modules that pip knows by another name"""

LOADERS = {"bitsandbytes": ("bitsandbytes",), "gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel", "optimum"), "compressed-tensors": ("compressed_tensors",)}
"""quantization method of a config -> the modules that loading such a checkpoint takes, beside transformers and accelerate"""


def need(what: str, *modules: str) -> None:
    """``what`` is what cannot be done without ``modules``. Raises `UsageProblem` with the command that installs those that are not here; imports none of them."""
    away = [module for module in modules if importlib.util.find_spec(module) is None]
    if away:
        names = " and ".join(packages(*away))
        extras = ",".join(dict.fromkeys(BROUGHT_BY[module] for module in away))
        raise UsageProblem(f"{what} needs {names}, which {'is' if len(away) == 1 else 'are'} not installed", fix=f"pip install 'qmerge[{extras}]'", written="nothing")


def need_loader(method: str) -> None:
    """`need` for loading a checkpoint whose ``quant_method`` is ``method``. Merging reads and writes every format without."""
    need(f"loading a {method} checkpoint", *(module for module in LOADERS.get(method, ()) if module in BROUGHT_BY))


def packages(*modules: str) -> list[str]:
    """Their names for pip."""
    return [SHOWN.get(module, module) for module in modules]
