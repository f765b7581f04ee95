"""What did the processes of a campaign do together? Sums the lines that `campaign.py --rows FILE` wrote, per reader: ``python tests/fuzz/summary.py FILE … > docs/measurements/fuzz.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per reader and in all: inputs by engine, what became of them, seconds, seeds; ``incomplete``: processes that were ended before they could report, whose inputs do not count."""
    readers: dict[str, dict[str, Any]] = {}
    for row in rows:
        one = readers.setdefault(row["reader"], {"inputs": 0, "guided": 0, "accepted": 0, "refused": 0, "failed": 0, "seconds": 0.0, "slowest_s": 0.0, "peak_bytes": 0, "processes": 0, "incomplete": 0, "seeds": [], "faults": {}})
        if "inputs" not in row:
            one["incomplete"] += 1
            continue
        one["processes"] += 1
        for key in ("inputs", "accepted", "refused", "failed"):
            one[key] += row[key]
        one["guided"] += row["inputs"] if row["engine"] == "atheris" else 0
        one["seconds"] = round(one["seconds"] + row["seconds"], 1)
        one["slowest_s"], one["peak_bytes"] = max(one["slowest_s"], row["slowest_s"]), max(one["peak_bytes"], row["peak_bytes"])
        one["seeds"].append(row["seed"])
        one["faults"] |= row["places"]
    whole = {key: sum(one[key] for one in readers.values()) for key in ("inputs", "guided", "accepted", "refused", "failed", "processes", "incomplete")}
    return {"all": whole | {"seconds": round(sum(one["seconds"] for one in readers.values()), 1)}, "readers": dict(sorted(readers.items()))}


def table(found: dict[str, Any]) -> str:
    """The same for people, in Markdown."""
    lines = ["| reader | inputs | of them guided | accepted | refused | failed | seconds | slowest, s |", "|---|---|---|---|---|---|---|---|"]
    for name, one in [*found["readers"].items(), ("**all**", found["all"])]:
        counts = " | ".join(f"{one[key]:,}" for key in ("inputs", "guided", "accepted", "refused", "failed"))
        lines.append(f"| {name} | {counts} | {one['seconds']:,.0f} | {one.get('slowest_s', '')} |")
    return "\n".join(lines)


def main() -> None:
    rows = [json.loads(line) for file in sys.argv[1:] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    found = summed(rows)
    print(json.dumps(found, indent=1))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
