"""What every room needs: checks, whole files, the cache folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast import common

NAMES = ("helpful", "harmless")


@pytest.mark.parametrize("w", [(1.0, 0.0), (0.3, 0.7), (0.1 + 0.2, 0.7)])
def test_a_preference_is_on_the_simplex(w):
    assert common.off_simplex(w, NAMES) is None
    common.require_simplex(w, NAMES)


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        ((1.0,), "1 numbers for 2 objectives"),
        ((1.5, -0.5), "harmless is negative"),
        ((float("nan"), 1.0), "helpful is nan"),
        ((0.5, float("inf")), "harmless is inf"),
        ((0.8, 0.3), "sums to 1.1"),
        ((0.5, 0.50001), "sums to 1.00001"),
    ],
)
def test_what_is_off_the_simplex_is_named(w, reason):
    assert common.off_simplex(w, NAMES) == reason
    with pytest.raises(ValueError, match=f"^w={re.escape(repr(w))}: .*{re.escape(reason)}$"):
        common.require_simplex(w, NAMES)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "values.json"
    common.write_atomic(path, "é")
    assert path.read_bytes() == "é".encode()
    with pytest.raises(OSError, match="full"), common.replacing(path) as file:
        file.write(b"half")
        raise OSError("full")
    assert path.read_bytes() == "é".encode() and list(tmp_path.iterdir()) == [path]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MEAL_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert common.cache_folder() == Path.home() / ".cache" / "meal-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert common.cache_folder() == tmp_path / "meal-fast"
    monkeypatch.setenv("MEAL_FAST_CACHE", str(tmp_path / "own"))
    assert common.cache_folder() == tmp_path / "own"


def test_it_needs_the_standard_library_alone():
    code = "import sys, meal_fast.common; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())


def test_a_sentence_breaks_between_words_at_a_terminal_and_nowhere_else(monkeypatch):
    sentence = "helpful: follows the knob, from no weight on it to all of it; see /runs/a-b/c.html"
    assert common.folded(sentence) == sentence
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    lines = common.folded(sentence).splitlines()
    assert len(lines) > 1 and all(len(line) <= 40 for line in lines)
    assert " ".join(line.strip() for line in lines) == sentence
