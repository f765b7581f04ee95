"""What got slower, from one file of bench_speed.py to a later one? Exit 3 where a ratio rose by more than 10 % and by more than both intervals leave room for.

Ratios are compared, not seconds: both sides of each were timed on the same machine in the same minutes. Other machines and versions are named, not refused.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from scipy import stats

ROOM = 1.10
"""a ratio may rise by so much"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    old, new = read(args.old), read(args.new)
    for what in ("machine", "versions"):
        other = [f"{key} {old[what].get(key)} → {new[what].get(key)}" for key in sorted({*old[what], *new[what]}) if old[what].get(key) != new[what].get(key)]
        if other:
            print(f"other {what}: {', '.join(other)}", file=sys.stderr)
    slower = []
    for name in sorted({*old["rows"], *new["rows"]}):
        rows = [found["rows"].get(name) for found in (old, new)]
        if None in rows:
            print(f"{name}: only in the {'new' if rows[0] is None else 'old'} file")
            continue
        value, low, high = change(*rows)
        state = "slower" if low > 1 and value > ROOM else "quicker" if high < 1 and value < 1 / ROOM else "same" if high < ROOM else "cannot be told"
        slower += [name] if state == "slower" else []
        print(f"{name}: {rows[0]['value']:.3g} → {rows[1]['value']:.3g}, × {value:.2f} ({low:.2f} to {high:.2f}): {state}")
    print(f"slower by more than {ROOM - 1:.0%}: {', '.join(slower) or 'none'}")
    return 3 if slower else 0


def read(path: Path) -> dict[str, Any]:
    """A file of bench_speed.py. SystemExit (2) where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] == "speed/1" and all(0 < row["ci_low"] <= row["value"] <= row["ci_high"] and row["n"] > 1 for row in found["rows"].values()):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    print(f"{path} is not a file of scripts/bench_speed.py", file=sys.stderr)
    raise SystemExit(2)


def change(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, float, float]:
    """New over old with its 95 % interval: the two files' rounds are independent, so variances of the logarithms add (Welch's t).

    >>> row = {"value": 1.0, "ci_low": 0.9, "ci_high": 1 / 0.9, "n": 5}
    >>> [round(x, 3) for x in change(row, row | {"value": 1.2, "ci_low": 1.08, "ci_high": 1.2 / 0.9})]
    [1.2, 1.06, 1.358]
    """
    errors = [math.log(row["ci_high"] / row["value"]) / float(stats.t.ppf(0.975, row["n"] - 1)) for row in (old, new)]
    total, middle = sum(error**2 for error in errors), math.log(new["value"] / old["value"])
    if total == 0:
        return math.exp(middle), math.exp(middle), math.exp(middle)
    freedom = total**2 / sum(error**4 / (row["n"] - 1) for error, row in zip(errors, (old, new), strict=True))
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


if __name__ == "__main__":
    sys.exit(main())
