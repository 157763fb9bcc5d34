"""The tables of measurements in docs/ are made from the committed rows."""

import json

from bench import rows, table

ROW = {
    "op": "linear_policy_loss",
    "case": "4,096 tokens",
    "device": "cpu",
    "command": "pytest bench/",
    "machine": {"cpu": "a CPU", "cores": 2},
    "versions": {"python": "3.11", "torch": "2.13"},
    "seconds": {"meal-fast": 0.5, "eager": 1.0},
    "peak_mib": {"meal-fast": 40, "eager": 2048},
}


def test_the_page_of_results_says_what_the_rows_say():
    text = table.OPS.read_text(encoding="utf-8")
    assert table.PLACE.search(text)
    assert table.rendered(text) == text


def test_the_newest_row_of_a_case_counts(tmp_path):
    newer = ROW | {"seconds": {"meal-fast": 0.002, "eager": 0.005}}
    other = ROW | {"op": "sample", "seconds": {"meal-fast": 3e-6}, "peak_mib": {"meal-fast": 1}}
    lines = [{"bench": "grpo-step"}, ROW, other, newer]
    (tmp_path / "cpu.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = "before\n<!-- bench: cpu -->\nold\n<!-- /bench -->\nafter\n"
    assert table.rendered(text, tmp_path) == (
        "before\n<!-- bench: cpu -->\n"
        "| op | case | meal-fast | eager |\n"
        "|---|---|---|---|\n"
        "| `linear_policy_loss` | 4,096 tokens | 2 ms, 40 MiB | 5 ms (×2.5), 2 GiB |\n"
        "| `sample` | 4,096 tokens | 3 µs, 1 MiB | – |\n"
        "\n"
        "`pytest bench/` on 2 cores of a CPU; python 3.11, torch 2.13.\n"
        "<!-- /bench -->\nafter\n"
    )
    text = text.replace("cpu", "h200")
    assert "Nothing measured yet." in table.rendered(text, tmp_path)


def test_versions_are_of_what_is_installed():
    found = rows.versions("torch", "no-such-package")
    assert set(found) == {"python", "torch"}


CHECKED = {
    "part": "ops",
    "case": "sample, top_k 50",
    "what": "sample",
    "who": "meal-fast",
    "figure": 1500.0,
    "unit": "µs",
    "floor": 750.0,
    "share": 0.5,
    "date": "2026-11-28T00:00:00+00:00",
    "device": "NVIDIA H100 80GB HBM3",
    "commit": "0123456789ab",
    "versions": {"torch": "2.11"},
}


def test_what_a_card_s_check_measured_becomes_a_section(tmp_path):
    text = "before\n<!-- gpu-check -->\nold\n<!-- /gpu-check -->\nafter\n"
    (tmp_path / "cpu.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "rehearsal.jsonl").write_text(json.dumps(CHECKED | {"rehearsal": True}) + "\n")
    none = "before\n<!-- gpu-check -->\nNothing has been measured on a card yet.\n"
    assert table.rendered_checked(text, tmp_path).startswith(none)
    profile = CHECKED | {"part": "profile", "case": "decode"}
    lines = [
        CHECKED | {"figure": 9000.0},  # older
        CHECKED,
        CHECKED | {"who": "eager", "figure": 12_000.0, "share": 0.0625},
        profile | {"what": "largest |x|", "figure": "not\nfinished", "unit": "", "ok": False},
        profile | {"what": "share of gemm", "figure": 0.75, "unit": "of 1"},
        profile | {"what": "share of copy", "figure": 0.25, "unit": "of 1"},
    ]
    del lines[3]["share"]
    (tmp_path / "h100-80gb-hbm3.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert table.rendered_checked(text, tmp_path) == (
        "before\n<!-- gpu-check -->\n"
        "## NVIDIA H100 80GB HBM3\n\n2026-11-28, commit 0123456789ab; torch 2.11.\n"
        "\n### ops\n\n| case | what | measured | of the floor | others |\n|---|---|---|---|---|\n"
        "| sample, top_k 50 | sample | 1.5 ms | 50 % | eager 12 ms |\n"
        "\n### profile\n\n| case | what | measured | of the floor | others |\n"
        "|---|---|---|---|---|\n"
        "| decode | largest \\|x\\| | not finished **failed** | – | – |\n"
        "| decode | time by kernel | `gemm` 75 %, `copy` 25 % | – | – |\n"
        "<!-- /gpu-check -->\nafter\n"
    )


def test_the_page_of_a_card_says_what_the_rows_say():
    text = table.MEASURED.read_text(encoding="utf-8")
    assert table.CHECKED.search(text)
    assert table.rendered_checked(text) == text
