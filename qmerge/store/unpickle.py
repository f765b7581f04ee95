"""How is a pickled state dict read without letting it near this process?

A child process (`unpickle_child.py`) without network, without the right to start or write anything, with limits on memory, time and output and an environment without home or
tokens, loads it with ``weights_only=True``: torch's unpickler for tensors and plain containers. It answers in safetensors, which this process reads as it reads any
stranger's file. There is no fall-back to a weaker loader.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from qmerge.errors import Refused
from qmerge.store.regular import check_contained, open_plain

LIMIT_S = 600
CHILD = Path(__file__).with_name("unpickle_child.py")
_KEPT = ("PATH", "LD_LIBRARY_PATH")


class Folder:
    """A new temporary folder at ``name``, removed with its last holder, or when the process ends."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="qmerge-")
        self.remove = weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


def as_safetensors(pickle: Path) -> tuple[Path, Folder]:
    """``(file, folder)``: the same tensors as safetensors, in a temporary folder that vanishes with the second value. Refused where torch will not load it, and where this
    system lets no process be cut off the network."""
    check_contained(pickle.parent, pickle.name)
    try:
        open_plain(pickle).close()
    except OSError as problem:
        raise Refused("The pickle cannot be read.", where=pickle.name, found=problem.strerror, fix="see that it may be read (ls -l), then run the same command again") from None
    folder = Folder()
    target = Path(folder.name) / "adapter_model.safetensors"
    said = _ask(pickle.resolve(), target, folder.name)
    if said is not None:
        folder.remove()
        raise Refused("The pickle could not be read safely.", where=pickle.name, expected="a dictionary of tensors", found=said,
                      fix="save the adapter as safetensors where it was trained; there is no weaker way to read it")
    return target, folder


def _ask(pickle: Path, target: Path, home: str) -> str | None:
    """Run the child; None where it wrote ``target``, else what it said."""
    environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | {"HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1"}
    job = json.dumps({"pickle": str(pickle), "path": [entry for entry in sys.path if entry and os.path.isabs(entry)]})
    with target.open("xb") as answer:
        # -I: nothing of the user's or of the working directory is imported; what torch needs comes by the list of folders
        child = subprocess.Popen([sys.executable, "-I", str(CHILD)], env=environment, cwd=home, stdin=subprocess.PIPE, stdout=answer, stderr=subprocess.PIPE)
        try:
            _, words = child.communicate(job.encode(), timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"nothing within {LIMIT_S} s"
        finally:
            if child.poll() is None:
                child.kill()
                child.communicate()
    if child.returncode == 0:
        return None
    last = (words.decode("utf-8", "replace").strip().splitlines() or ["no word"])[-1]
    if child.returncode < 0:
        last = f"it was ended by {signal.Signals(-child.returncode).name}"
    return re.sub(r"(?<![\w.])/[^\s'\":]*/", "…/", last)[:200]
