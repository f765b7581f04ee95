"""May another library open this model folder?

transformers, gptqmodel and PEFT follow what a folder says: paths in an index out of it, a pickle where safetensors are missing, an adapter that lies beside the config,
another weight file that the config names. So the folder is read strictly first, headers and configs alone, and refused where they would be led anywhere.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qmerge.errors import Refused
from qmerge.store.checkpoint import Checkpoint, open_checkpoint
from qmerge.store.inert import redirecting
from qmerge.store.jsonfiles import read_object
from qmerge.store.regular import check_contained
from qmerge.store.sidefiles import CONFIGS, TOKENIZER, matching

MAX_TOKENIZER_BYTES = 200_000_000
READ_TOO = ("config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
"""what gptqmodel reads beside the config"""
TRAPS = ("adapter_config.json",)
"""with it in a model's folder transformers puts the adapter on the model, from a pickle too"""


def check_model_folder(path: str | Path, name: str | None = None) -> Checkpoint:
    """The checkpoint, opened by our own reader (`open_checkpoint` says what that refuses). Refused also: a config that leads a loader to other files, an adapter inside the
    folder, and whatever `check_tokenizer_folder` refuses. ``name`` stands for the folder in messages."""
    checkpoint = open_checkpoint(path)
    folder = checkpoint.path
    where = name or checkpoint.name
    for config in READ_TOO:
        if (folder / config).exists():
            check_contained(folder, config)
            _check_config(read_object(folder / config, what="a config of the model"), f"{config} in {where}")
    if trap := next((trap for trap in TRAPS if (folder / trap).exists()), None):
        raise Refused("The model's folder holds an adapter as well, which loaders would put on the model unasked.", where=f"{trap} in {where}", expected="a model alone", found="a model and an adapter",
                      fix="move the adapter's files into a folder of their own")
    check_tokenizer_folder(folder)
    return checkpoint


def check_tokenizer_folder(path: str | Path) -> None:
    """Refused where a file that a tokenizer's loader opens by name is no plain file inside the folder, is larger than 200 MB, or where a config of it is no JSON object."""
    folder = Path(path)
    for name in matching(folder, (*TOKENIZER, *CONFIGS)):
        check_contained(folder, name)
        size = (folder / name).stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise Refused("A tokenizer's file is too large to be one.", where=f"{name} in {folder.name}", expected=f"at most {MAX_TOKENIZER_BYTES} bytes", found=f"{size} bytes")
        if name in (*CONFIGS, "tokenizer_config.json"):
            read_object(folder / name, what="a config beside the model")
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in (*TOKENIZER, *CONFIGS, *READ_TOO)):
            raise Refused("A file of an input is a pipe, a device or a folder.", where=f"{path.name} in {folder.name}", expected="a plain file", found="something else")


def _check_config(config: dict[str, Any], where: str) -> None:
    own = where.startswith("config.json")
    if own and not isinstance(config.get("quantization_config", {}), (dict, type(None))):
        raise Refused("the config's quantization_config is malformed", where=where, expected="an object", found=type(config["quantization_config"]).__name__)
    if found := next(redirecting(config if own else {"quantization_config": config}), None):
        raise Refused("A config leads loaders to other files or code than the checked ones.", where=where, expected="weights and settings in the folder itself", found=found if own else found.removeprefix("quantization_config."),
                      fix="remove this key from the config if you trust the rest")
