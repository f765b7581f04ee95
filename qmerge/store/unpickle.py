"""How is a pickled state dict read without letting it near this process?

A child process with an environment of its own loads it with ``weights_only=True`` (torch's unpickler for tensors and plain containers) and writes safetensors into a
temporary folder; this process reads that as it reads any stranger's file. There is no fall-back to a weaker loader. Left out: cutting the child off the network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qmerge.errors import Refused

LIMIT_S = 600

_CHILD = """
import sys, torch
from qmerge.store.durable import write_chunks
from qmerge.store.writer import serialize
from pathlib import Path
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
    sys.exit("it holds something other than named tensors")
write_chunks(Path(sys.argv[2]), serialize({k: v.detach().contiguous().clone() for k, v in state.items()}, {}))
"""


def as_safetensors(pickle: Path) -> tuple[Path, tempfile.TemporaryDirectory]:
    """``(file, folder)``: the same tensors as safetensors, in a temporary folder that vanishes with the second value. Refused where torch will not load it."""
    folder = tempfile.TemporaryDirectory(prefix="qmerge-")
    target = Path(folder.name) / "adapter_model.safetensors"
    environment = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR") if key in os.environ}
    try:
        done = subprocess.run([sys.executable, "-c", _CHILD, str(pickle), str(target)], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        said = done.stderr.strip().splitlines()[-1:] or ["no word"]
    except subprocess.TimeoutExpired:
        done, said = None, [f"nothing within {LIMIT_S} s"]
    if done is None or done.returncode or not target.is_file():
        raise Refused("The pickle could not be read safely.", where=pickle.name, expected="a dictionary of tensors", found=said[0][:200],
                      fix="save the adapter as safetensors where it was trained; there is no weaker way to read it")
    return target, folder
