"""Does the reader of item logs answer for any rows, and can the benchmarks be counted again from what it accepts?

An input is the log of the separate model, a zero byte, and the log of a candidate; results.json names them with their digests, as a stranger's would.
"""

from __future__ import annotations

import hashlib
import json
from random import Random
from typing import Any

from fuzz import bending
from fuzz.places import Broken, Seeds, folder, refused
from qmerge.errors import QmergeError
from qmerge.quality.paired import task_rows
from qmerge.quality.samples import FIELDS, file_name, read_samples, sample_text, samples_folder

ARMS = ("separate", "nf4")
TASK = "arc_easy"
WORDS = (*sorted(FIELDS), "margin", TASK, "acc,none", "acc_norm,none", "exact_match,strict", "h0", "a passage")
MAX_LEN = 3000
_RESULTS = folder("samples") / "results.json"
samples_folder(_RESULTS).mkdir()


def _item(number: int, **changes: Any) -> dict[str, Any]:
    row = {"task": TASK, "item": number, "hash": f"h{number}", "prompt_hash": "p", "metric": "acc,none", "correct": 1.0, "gold": [0], "loglikelihoods": [-1.5, -2.0, None], "lengths": [5, 6, 7], "margin": 0.5}
    return {key: value for key, value in (row | changes).items() if value is not None}


def _log(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def seeds() -> Seeds:
    choices = (_item(0), _item(1, correct=0.0, cluster="a passage"), _item(2, gold=[1, 2], loglikelihoods=[-1.0, -2.0, -3.0], truncated=True))
    texts = tuple(_item(number, metric="exact_match,strict", answer="4", gold=None, loglikelihoods=None, lengths=None, margin=None, correct=share) for number, share in enumerate((1.0, 0.5)))
    normed = tuple(_item(number, metric="acc_norm,none", loglikelihoods=[-1.0, -2.0, -3.0]) for number in (3, 4))
    alone = (_item(5, loglikelihoods=[-1.0], lengths=[4]),)
    accepted = (_log(*choices) + b"\0" + _log(*reversed(choices)), _log(*texts) + b"\0" + _log(*texts), _log(*normed) + b"\0" + _log(*normed), _log(*alone) + b"\0" + _log(*alone))
    wrong = ({"gold": [7]}, {"gold": "x"}, {"lengths": [1]}, {"gold": [-1]}, {"loglikelihoods": ["a", "b"]}, {"task": 5}, {"correct": True}, {"correct": 1e300})
    return Seeds(accepted, (b"", b"\0", _log(choices[0]) + b"\0", _log(choices[0]) + b"\0" + _log(choices[1]), b"[" * 2000 + b"\0", *(_log(_item(0, **change)) + b"\0" + _log(_item(0, **change)) for change in wrong)))


def check(data: bytes) -> bool:
    arms: dict[str, Any] = {}
    for arm, log in zip(ARMS, (*data.split(b"\0")[:2], b""), strict=False):
        name = file_name(arm, TASK)
        (samples_folder(_RESULTS) / name).write_bytes(log)
        arms[arm] = {"tasks": {TASK: {"samples": name, "samples_sha256": hashlib.sha256(log).hexdigest()}}}
    try:
        answers = read_samples(_RESULTS, {"arms": arms})
        tasks = task_rows(answers, arms)
    except QmergeError as error:
        return refused(error)
    json.dumps([tasks, arms], allow_nan=False)
    for arm, row in answers.items():
        written = sample_text(row[TASK])
        (samples_folder(_RESULTS) / file_name(arm, TASK)).write_text(written, encoding="utf-8", newline="\n")
        again = read_samples(_RESULTS, {"arms": {arm: {"tasks": {TASK: {"samples": "", "samples_sha256": hashlib.sha256(written.encode()).hexdigest()}}}}})
        if again[arm][TASK] != row[TASK]:
            raise Broken(f"{row[TASK]} is read back as {again[arm][TASK]}")
    return True


def mutate(data: bytes, random: Random) -> bytes:
    logs = data.split(b"\0")[:2]
    lines = logs[(which := random.randrange(len(logs)))].split(b"\n")
    place = random.randrange(len(lines))
    text = bending.bend_text(lines[place].decode("utf-8", "replace"), random, WORDS)
    if text is None or random.random() < 0.05:
        return bending.bend_bytes(data, random, WORDS)
    lines[place] = text.encode("utf-8", "surrogatepass")
    logs[which] = b"\n".join(lines)
    return b"\0".join(logs if random.random() < 0.3 else [logs[which]] * 2)
