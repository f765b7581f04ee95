"""An initialisation took something out of the base (PiSSA, OLoRA, LoftQ, …): can that be undone?

Training then started from ``W - s · B0 A0`` and an adapter ``B0 A0``. On the unchanged base the trained adapter's delta is ``s · (B A - B0 A0)``, so it can be merged where
the folder keeps the adapter as it was at the start (LLaMA-Factory writes ``pissa_init``, PEFT's recipe asks for such a copy). Otherwise it is refused: merged
as it is, the components that were taken out would count twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qmerge.errors import Refused
from qmerge.store.adapter import CONFIG, AdapterFiles
from qmerge.store.regular import check_contained

if TYPE_CHECKING:
    from qmerge.adapters.adapter import Adapter

FOLDERS = ("pissa_init", "initial_adapter")
"""subfolders (of the adapter's folder, or beside it) that hold the adapter as it was before training"""


def find_initial(source: AdapterFiles, init: str, where: str, open_it: Callable[[Path], Adapter]) -> Adapter:
    """The adapter before training. Refused where there is none, or it does not fit the trained one tensor for tensor."""
    places = [parent / name for parent in (source.path, source.path.parent) for name in FOLDERS]
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    if found is None:
        raise Refused("The adapter's initialisation changed the base weights, so the delta does not belong on the unchanged base.", where=where,
                      expected="init_lora_weights: true, false, gaussian, eva, orthogonal or mica; or the adapter before training in a subfolder " + " or ".join(FOLDERS),
                      found=f"init_lora_weights: {init!r}",
                      fix="--residual-base if --base is the base that the initialisation left behind; or convert it to a plain LoRA first (PEFT: "
                          "save_pretrained(…, path_initial_model_for_weight_conversion=…))")
    check_contained(source.path.parent, found.relative_to(source.path.parent).as_posix())
    initial = open_it(found)
    trained = {key: spec.shape for key, spec in source.specs.items()}
    before = {key: spec.shape for key, spec in initial.specs.items()}
    if trained != before or initial.config.get("use_dora") or initial.config.get("use_rslora") != source.config.get("use_rslora"):
        raise Refused("The adapter before training does not fit the trained one.", where=f"{found.name} of {source.name}", expected="the same tensors, shapes and kind of scaling",
                      found=f"{len(before)} tensors" if before != trained else "another kind")
    return initial
