"""docs/api.md lists the public names: each room's `__all__`, no more and no less."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def listed() -> dict[str, list[str]]:
    """The names of each section: `## meal_fast.ROOM` and its table."""
    sections = re.split(r"^## (meal_fast\.\w+)$", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {
        module: re.findall(r"^\| `(\w+)` \| \S", text, re.M)
        for module, text in zip(sections[::2], sections[1::2], strict=True)
    }


def test_every_room_that_exports_names_is_on_the_page():
    rooms = [path.parent.name for path in (PAGE.parents[1] / "meal_fast").glob("*/__init__.py")]
    modules = [importlib.import_module(f"meal_fast.{room}") for room in rooms]
    exporting = {module.__name__ for module in modules if hasattr(module, "__all__")}
    assert {"meal_fast.ops", "meal_fast.config", "meal_fast.rollout"} <= exporting
    assert exporting <= set(listed())


@pytest.mark.parametrize("module", listed())
def test_a_room_exports_what_the_page_lists(module):
    room = importlib.import_module(module)
    assert sorted(listed()[module]) == sorted(room.__all__)
    assert all(hasattr(room, name) for name in room.__all__)
