"""Imports point one way: a layer may use those before it in the list, never one behind it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qmerge"
PICTURE = PACKAGE.parent / "docs" / "architecture.md"
ORDER = (("__init__", "types", "errors", "extras", "units", "room", "device_names", "device", "launch", "watch", "ranks"), ("numerics",), ("store",), ("adapters",), ("formats",), ("pipeline",), ("quality",), ("report",), ("api",), ("cli", "__main__"))
FORBIDDEN = {"quality": {"pipeline"}, "report": {"pipeline", "quality", "formats"}}
RANK = {layer: rank for rank, layers in enumerate(ORDER) for layer in layers}


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> set[str]:
    """Layers of qmerge that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "qmerge" else [node.module or ""]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "qmerge":
                layer = rest.split(".")[0]
                found.add(layer if layer in RANK else "__init__")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    """An import that points up: soon nothing can be read or tested alone, and evidence is measured with the code that it judges."""
    # the front door fetches the names of api when they are used; that it loads nothing is in test_api.py
    own = "api" if path == PACKAGE / "__init__.py" else layer_of(path)
    wrong = {other for other in imported(path) if RANK[other] > RANK[own] or other in FORBIDDEN.get(own, set())}
    assert not wrong, f"qmerge/{own} must not import {', '.join(sorted(wrong))}"


def test_the_picture_is_what_the_imports_say():
    """docs/architecture.md drawn once, and the code gone elsewhere since."""
    rows = re.findall(r"^ ?(\d+) (\w+) +.*-> (.+)$", PICTURE.read_text("utf-8"), re.M)
    assert [(int(rank), layer) for rank, layer, _ in rows] == [(rank + 1, layer) for rank, layers in reversed(list(enumerate(ORDER))) for layer in reversed(layers)]
    found: dict[str, set[str]] = {layer: set() for layer in RANK}
    for path in PACKAGE.rglob("*.py"):
        found[layer_of(path)] |= imported(path) - {layer_of(path)}
    drawn = {layer: set() if names == "nothing" else set(names.split()) for _, layer, names in rows}
    wrong = {layer: " ".join(sorted(found[layer])) or "nothing" for layer in found if found[layer] != drawn[layer]}
    assert not wrong, f"docs/architecture.md has to say after the arrow: {wrong}"
