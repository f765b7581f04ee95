"""Does the reader of a model card's licence answer for any front matter, with nothing that could break the card it is written into?

An input is the YAML between the dashes of a stranger's README.md.
"""

from __future__ import annotations

import re

from fuzz import yamlish
from fuzz.places import Broken, Seeds
from qmerge.report.card import licence_of

WORDS = ("license", "license_name", "license_link", "apache-2.0", "other", "llama3", "LICENSE", "https://example.com/licence", "base_model", "tags", "language")
MAX_LEN = 1024
mutate = yamlish.mutator(WORDS)
CARRIED = re.compile(r"[!-~]+(?: [!-~]+)*")
"""printable, on one line"""


def seeds() -> Seeds:
    return yamlish.documents({"license": "apache-2.0"}, {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}, {"license": ["mit"], "tags": ["a"]})


def check(data: bytes) -> bool:
    found = licence_of("---\n" + data.decode("utf-8", "replace") + "\n---\n# A model\n", {})
    for key, value in found.items():
        if not isinstance(value, str) or not CARRIED.fullmatch(value):
            raise Broken(f"{key}: {value!r}")
    return bool(found)
