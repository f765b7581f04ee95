"""Write the committed files that are made from the code: the schema of recipes, docs/cli.md, docs/errors.md.

    python scripts/write_generated.py            # writes those that have changed, and names them
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cli_reference import reference  # noqa: E402
from errors_page import page  # noqa: E402

from qmerge.cli.recipe_schema import schema_text  # noqa: E402

ROOT = Path(__file__).parents[1]
GENERATED: dict[str, Callable[[], str]] = {"qmerge/cli/recipe.schema.json": schema_text, "docs/cli.md": reference, "docs/errors.md": page}
"""file -> what makes its text"""


def main() -> None:
    for name, make in GENERATED.items():
        path, text = ROOT / name, make()
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")


if __name__ == "__main__":
    main()
