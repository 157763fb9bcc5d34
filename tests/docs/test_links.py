"""What README, CONTRIBUTING and docs/ point to is there: links, their headings, and paths."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "SECURITY.md",
            "tests/README.md",
        )
    ),
    *(ROOT / name for name in ("kernels/README.md", "csrc/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
QUOTED = re.compile(r"`([\w.-]+(?:/[\w.{},-]+)+/?)`")  # a path of two parts or more
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
TOP = {"bench", "csrc", "docs", "examples", "kernels", "meal_fast", "tests", "tools", ".ci"}
PLACEHOLDER = re.compile(r"/[A-Z]+\.\w+$")  # NAME.py of a how-to
BARE_TEST = re.compile(r"`(test_\w+\.py)`")


def slug(heading: str) -> str:
    """A heading's anchor, the same on GitHub and in the site."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to nothing."""
    wrong = []
    for link in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that start in a folder of ours, and tests, that are not there."""
    quoted = [path for path in QUOTED.findall(text) if path.partition("/")[0] in TOP]
    quoted = [path for path in quoted if not PLACEHOLDER.search(path)]
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [path for path in quoted if not (ROOT / path).exists()]
    return missing + [name for name in BARE_TEST.findall(text) if name not in tests]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    if page.name != "CHANGELOG.md":  # which speaks of what was, too
        assert missing_paths(text) == []


def test_a_broken_link_is_found():
    page = ROOT / "docs" / "index.md"
    text = "[a](results.md) [b](no-page.md) [c](results.md#none) `bench/no_file.py` `test_no.py`"
    assert broken_links(page, text) == ["no-page.md", "results.md#none"]
    assert missing_paths(text) == ["bench/no_file.py", "test_no.py"]


def test_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_site_s_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages == {n for n in pages if re.search(rf"\b{re.escape(n)}$", navigation, re.M)}


def test_targets_that_the_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
    assert {"train", "test", "docs"} <= named <= targets
