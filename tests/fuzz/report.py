"""Are report.md, report.html and JUnit XML made of whatever the results reader accepts, without a crash, and are they inert?

An input is results.json. No element, attribute, link, address or control character of a page may come from it.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from fuzz.places import Broken, Seeds
from fuzz.results import MAX_LEN, WORDS, floors, loaded, mutate
from fuzz.results import seeds as of_results
from qmerge.report.html import render_html
from qmerge.report.junit import render_junit
from qmerge.report.markdown import render_markdown

__all__ = ["MAX_LEN", "WORDS", "check", "mutate", "seeds"]
ELEMENTS = set(
    "html head meta title style body main header section h1 h2 h3 p strong em span ul ol li div table thead tbody tr th td figure figcaption details summary svg desc rect text path".split()
)
HIDDEN = r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]"
_TAG = re.compile(r"<(?!/)([^\s>/]*)([^>]*)>")
_SPOKEN = re.compile(r'\saria-label="[^"<>]*"')  # read out as words: a name may say javascript: there
_DOES = re.compile(r"(?i)\son\w+\s*=|\b(href|src|srcdoc|action|formaction)\s*=|javascript:|url\(")


def seeds() -> Seeds:
    pages = (*of_results().accepted, *floors())
    return Seeds(pages, tuple(data for data in of_results().refused if data not in pages))


def check(data: bytes) -> bool:
    if (results := loaded(data)) is None:
        return False
    page = render_html(results)
    body = page[page.index("</style>") + 8 :]
    if found := re.search(HIDDEN, body):
        raise Broken(f"{found[0]!r} in the page")
    for name, attributes in _TAG.findall(body):
        if name not in ELEMENTS or _DOES.search(_SPOKEN.sub("", attributes)):
            raise Broken(f"<{name}{attributes}>")
    markdown = render_markdown(results)
    if found := re.search(HIDDEN + r"|<[a-zA-Z/!?]|\]\(", markdown):
        raise Broken(f"{found[0]!r} in the Markdown: {markdown[max(0, found.start() - 60) : found.end() + 60]!r}")
    ElementTree.fromstring(render_junit(results).encode())
    return True
