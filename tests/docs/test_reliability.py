"""docs/reliability.md is written by the test run, and lists every test that is marked for it."""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.reliability import KINDS, Page, cell, note_mark

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def marks(tree: ast.AST) -> Iterator[tuple[str, str] | None]:
    """Kind and what of each mark; None for one that is put together when the tests are made."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.reliability":
            kind, what = node.args
            said = isinstance(kind, ast.Constant) and isinstance(what, ast.Constant)
            yield (kind.value, what.value) if said else None


def test_the_page_lists_what_is_marked():
    wanted, made = set(), set()  # made: files with marks that are not written out
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT).as_posix()
        for mark in marks(ast.parse(path.read_text(encoding="utf-8"))):
            if mark is None:
                made.add(name)
            elif path != Path(__file__):
                wanted.add((mark[0], cell(mark[1]), name))
    assert {kind for kind, _, _ in wanted} <= set(KINDS)
    found, kinds = set(), {title: kind for kind, title in KINDS.items()}
    kind = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind = kinds.get(line[3:])
        row = re.fullmatch(r"\| (.*) \| .* \| `(.*)::(\w+)` \|", line)
        if row and kind:
            what, path, name = row.groups()
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
            found.add((kind, what, path))
    assert wanted <= found, f"run `make reliability`: it lacks {sorted(wanted - found)}"
    surplus = {row for row in found - wanted if row[2] not in made}
    assert not surplus, f"run `make reliability`: {sorted(surplus)} are no longer there"
    assert made <= {path for _, _, path in found}


def test_a_page_counts_each_input_and_says_what_failed(tmp_path):
    conftest = f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tools import reliability
        def pytest_configure(config):
            config.addinivalue_line("markers", "reliability(kind, what)")
            config.pluginmanager.register(reliability.Page(Path({str(tmp_path / "page.md")!r})))
        def pytest_collection_modifyitems(items):
            for item in items:
                reliability.note_mark(item)
        """
    tests = """
        import pytest
        @pytest.mark.reliability("fault", "a kill | a crash")
        @pytest.mark.parametrize("n", [1, 2, 3])
        def test_kill(n, record_property):
            if n == 1:
                record_property("kills survived", "1 of 1")
            assert n < 3
        @pytest.mark.reliability("attack", "an escape")
        def test_skipped():
            pytest.skip("no browser")
        def test_other():
            pass
        """
    (tmp_path / "conftest.py").write_text(textwrap.dedent(conftest))
    (tmp_path / "test_it.py").write_text(textwrap.dedent(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout
    text = (tmp_path / "page.md").read_text()
    assert r"| a kill \| a crash | 2 of 3 | `" in text and "::test_kill` |" in text
    assert "| an escape | not run here |" in text and "test_other" not in text
    assert "| kills survived | 1 of 1 |" in text
    assert f"| {KINDS['fault']} | 2 | 3 |" in text


def test_an_unknown_kind_is_named():
    class Item:
        nodeid, user_properties = "test_x", []

        def get_closest_marker(self, name):
            return pytest.mark.reliability("silly", "x").mark

    with pytest.raises(ValueError, match=r"'silly'.*silent, lost"):
        note_mark(Item())


def test_an_empty_page_can_be_written():
    assert "# Reliability" in Page(PAGE).text()
