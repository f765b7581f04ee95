"""What can be refused before torch is imported? Misspelt names and places: whoever typed one hears of it in half a second.

The same is asked again, with everything else, once the libraries are there; nothing here is the only check of its kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qmerge.adapters.choices import AdapterSet
from qmerge.store.hub import local_folder, resolve, split_name
from qmerge.store.texts import text_files

if TYPE_CHECKING:
    from qmerge.pipeline.recipe import Recipe


def look_at_recipe(recipe: Recipe, writes: bool = True) -> None:
    """Everything that a merge needs, by name. ``writes``: will this process write OUT? Raises `UsageProblem` and `Refused`."""
    from qmerge.formats import QUANTIZING
    from qmerge.pipeline.recipe import read_nf4_recipe
    from qmerge.pipeline.recipe_checks import check_calibration_given
    from qmerge.store.publish import check_output

    check_calibration_given(recipe)
    read_nf4_recipe(recipe.nf4_recipe)
    if recipe.format in QUANTIZING and not recipe.rtn:
        look_at_texts((recipe.calibration, recipe.generic))
    here = look_at_models((recipe.original if recipe.on == "original" and recipe.original else recipe.base,), recipe.adapter_set)
    if writes and not recipe.each:
        check_output(Path(recipe.out), here, recipe.overwrite)


def look_at_models(places: Iterable[str | None], adapters: AdapterSet | None = None) -> list[Path]:
    """The folders that are here. Ids of the hub are asked for, and fetched, once no place is certainly wrong. Raises `Refused` for what is neither."""
    named = [*filter(None, places), *(split_name(one.place)[0] for one in (adapters.choices if adapters else ()))]
    found = [(place, local_folder(place)) for place in named]
    return [folder or resolve(place)[0] for place, folder in found]


def look_at_texts(places: Iterable[str | None]) -> None:
    """Raises `Refused` for what is no text here and no hub dataset's name."""
    for place in filter(None, places):
        text_files(place)
