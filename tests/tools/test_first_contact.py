"""`make gpu-check`, rehearsed without a card; and what goes wrong in it costs itself alone."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meal_fast.training.recipes import RECIPES
from tests.helpers import pretend
from tools import first_contact
from tools.contact import counters, profile, recipes, sampler, sanitizer, shapes, suite
from tools.contact.here import Here

ROOT = Path(__file__).resolve().parents[2]
# What a machine with a card may lack.
ABSENT = ("moocore", "gguf", "datasets", "trl", "liger_kernel")
# Parts of a check, as modules of tools/contact: a namespace that a second folder adds to.
PLANTED = """
import os, time
from pathlib import Path

def cases(here):
    def fail():
        raise ValueError("planted")

    def hang():
        here.row("hanging", 1.0, "s")
        time.sleep(1)  # for it to be read
        Path(here.folder, "..", "planted.pid").write_text(str(os.getpid()))
        time.sleep(600)

    return {
        "first": lambda: here.row("seconds", 2.0, "s", floor=1.0),
        "raises": fail,
        "dies": lambda: os.abort(),
        "hangs": hang,
        "misses": lambda: here.row("errors", 3, "errors", ok=False),
        "last": lambda: print("to standard error") or here.row("what", "said", note="a note"),
    }
"""


def planted(folder):
    where = folder / "planted" / "tools" / "contact"
    where.mkdir(parents=True)
    (where / "planted.py").write_text(PLANTED)
    (where / "broken.py").write_text("raise RuntimeError('cannot be imported')")
    return str(folder / "planted")


def rows_of(out, name="rehearsal"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_every_part_is_rehearsed_without_a_card_or_git_or_optional_packages(tmp_path):
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(name=__name__)")
    environment = os.environ | {
        "OUT": str(tmp_path / "out"),
        "PATH": str(tmp_path / "no programs"),
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MEAL_FAST_COMMIT", None)
    command = [sys.executable, "-m", "tools.first_contact", "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failures = tmp_path / "out" / "rehearsal.txt"
    said = done.stdout + done.stderr + (failures.read_text() if failures.exists() else "")
    assert done.returncode == 0, said
    *table, paths = done.stdout.splitlines()
    assert max(map(len, table)) <= 80 and "rehearsal.jsonl" in paths
    assert "A rehearsal on the CPU" in done.stdout
    rows = rows_of(tmp_path / "out")
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(first_contact.PARTS)
    for row in rows:
        assert row["rehearsal"] is True and row["device"] == "cpu" and row["commit"] == "unknown"
        assert {"torch", "transformers", "python"} <= set(row["versions"])
        assert row.get("ok") is not False
    assert set(RECIPES) <= {row["case"] for row in rows if row["part"] == "recipes"}
    shares = [row for row in rows if "share" in row]
    assert all(row["share"] == pytest.approx(row["floor"] / row["figure"], 1e-2) for row in shares)
    equal = [row["figure"] for row in rows if row["what"].startswith("answers of graphs")]
    assert len(equal) == 8 and max(equal) == 1
    tests = next(row for row in rows if row["what"] == "all files")
    assert tests["figure"] >= 1 and "skipped" in tests["note"]


def test_without_a_card_it_says_so_in_one_line():
    command = [sys.executable, "-m", "tools.first_contact"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "first contact: no CUDA device here; --rehearse runs the parts on the CPU\n"
    )


def test_the_script_runs_by_its_path_too():
    command = [sys.executable, str(ROOT / "tools" / "first_contact.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == list(first_contact.PARTS)
    assert sum(part.share for part in first_contact.PARTS.values()) <= 600 - first_contact.LAST


def test_what_fails_dies_or_hangs_costs_itself_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", planted(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(first_contact, "CASE", 1.0)
    monkeypatch.setattr(first_contact, "CASE_SHARE", 0.05)
    part = first_contact.Part
    parts = {"broken": part("broken", 1, ""), "planted": part("planted", 1, "")}
    monkeypatch.setattr(first_contact, "PARTS", parts)
    assert first_contact.main(["--rehearse", "--seconds", "100"]) == 1
    rows = rows_of(tmp_path / "out")
    assert [row["case"] for row in rows] == ["ceilings"] * 3 + ["first", "hangs", "misses", "last"]
    assert rows[3]["share"] == 0.5 and rows[-1]["figure"] == "said"
    text = (tmp_path / "out" / "rehearsal.txt").read_text()
    assert "RuntimeError: cannot be imported" in text and "ValueError: planted" in text
    assert "dies: killed by SIGABRT" in text and "hangs: stopped: it took too long" in text
    assert "misses: errors: 3 errors" in text and "Aborted" in text
    said = capsys.readouterr().out
    assert "Failures (5):" in said and "7 rows: " in said
    counts = next(line for line in said.splitlines() if line.startswith("planted "))
    assert counts.split()[1:4] == ["3", "4", "0"]


def test_a_case_that_there_is_no_time_for_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert first_contact.main(["--rehearse", "--seconds", "1", "--part", "ops"]) == 1
    assert "Not reached: ops: all of it" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_summary_of_what_there_is(tmp_path, number):
    code = (
        "import sys; from tools import first_contact as f\n"
        "f.PARTS = {n: f.Part(n, 1, '') for n in ('planted', 'later')}\n"
        "f.RESTARTS = 9; sys.exit(f.main(['--rehearse']))"
    )
    environment = os.environ | {
        "PYTHONPATH": planted(tmp_path),
        "OUT": str(tmp_path / "out"),
        "TMPDIR": str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    path, until = tmp_path / "planted.pid", time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"Stopped by {number.name}" in said and "Not reached: later: the rest" in said
    assert rows_of(tmp_path / "out")[-1]["what"] == "hanging"
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


def here(folder, seconds=120.0, device="cpu"):
    ceilings = {"bytes_per_s": 1e12, "flop_per_s": 1e14, "launch_s": 1e-6}
    return Here(device, True, time.monotonic() + seconds, folder, io.StringIO(), ceilings)


def told(of):
    return [json.loads(line) for line in of.out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (recipes, ["weighted-meta-grpo", "meal"]),
        (sampler, ["log-probabilities, two layers, float32", "three ways, SmolLM2-135M, float32"]),
    ],
    ids=["recipes", "sampler"],
)
def test_on_a_pretended_card_no_part_mixes_devices(tmp_path, monkeypatch, part, names):
    for shape in shapes.SHAPES:
        shapes.folder_of(here(tmp_path), shape)
    trained = recipes.trained  # the CPU's run beside it is no part of a card's
    monkeypatch.setattr(
        recipes, "trained", lambda h, recipe, _, *rest: trained(h, recipe, "cuda", *rest)
    )
    of = here(tmp_path, device="cuda")
    with pretend.device():
        for name in names:
            of.case = name
            part.cases(of)[name]()
    rows = [line["row"] for line in told(of)]
    assert {row["case"] for row in rows} == set(names)
    assert [row for row in rows if row.get("ok") is False] == []


def test_tests_that_fail_are_told_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "FEW", "test")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    one, two = tmp_path / "test_one.py", tmp_path / "test_two.py"
    one.write_text("def test_a(): pass\ndef test_b(): assert 1 + 1 == 3, 'planted'\n")
    two.write_text("import no_such_module\n")
    of = here(tmp_path)
    suite.run(of, [one, two])
    rows = [line["row"] for line in told(of) if "row" in line]
    failed = [line["fail"] for line in told(of) if "fail" in line]
    assert any("test_b" in text and "planted" in text for text in failed)
    assert any("no_such_module" in text for text in failed)
    total = next(row for row in rows if row["what"] == "all files")
    assert total["figure"] == 1 and total["note"].startswith("2 failed")
    (tmp_path / "reports").rename(tmp_path / "before")
    one.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    of = here(tmp_path, 15.0)
    suite.run(of, [one])
    rows = [line["row"] for line in told(of) if "row" in line]
    assert [row["figure"] for row in rows] == [1, 1, "not finished in time"]


def test_the_files_that_have_tests_for_a_card_are_found():
    names = {path.name for path in suite.files(ROOT / "tests")}
    assert {"test_linear_logprob.py", "test_csrc_sample.py", "test_gpu.py"} <= names
    assert "test_config.py" not in names


def test_what_waits_for_the_card_is_known_by_name():
    for name in ("cudaStreamSynchronize", "cuStreamSynchronize", "cudaDeviceSynchronize"):
        assert profile.WAIT.match(name)
    assert not profile.WAIT.match("cudaLaunchKernel") and profile.LAUNCH.match("cudaGraphLaunch")


# Two kernels as `ncu --csv --metrics` writes them: the format is ncu's, the figures are made up.
NCU = """==PROF== Connected to process 71 (python3.12)
==PROF== Profiling "_stats" - 0: 0%....50%....100% - 1 pass
sample ran as cuda
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","71","python3.12","127.0.0.1","_stats","1","7","(128, 1, 1)","(4096, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","ns","1,250,500"
"0","71","python3.12","127.0.0.1","_stats","1","7","(128, 1, 1)","(4096, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","61.52"
"1","71","python3.12","127.0.0.1","void sample_kernel<float>(const float *)","1","7",\
"(512, 1, 1)","(256, 1, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","usecond","31.5"
"1","71","python3.12","127.0.0.1","void sample_kernel<float>(const float *)","1","7",\
"(512, 1, 1)","(256, 1, 1)","0","9.0","Command line profiler metrics",\
"launch__registers_per_thread","register/thread","n/a"
"""


def test_what_ncu_says_is_read():
    assert list(counters.rows(NCU)) == [
        ("_stats", "duration", 1250.5, "µs"),
        ("_stats", "memory's rate", 61.52, "%"),
        ("void sample_kernel<float>", "duration", 31.5, "µs"),
    ]
    assert list(counters.rows("==ERROR== ERR_NVGPUCTRPERM\n")) == []
    command = counters.command("ncu", "sample", "cuda")
    assert command[command.index("--clock-control") + 1] == "none"


def test_what_compute_sanitizer_says_is_counted():
    clean = "========= COMPUTE-SANITIZER\nsample ran as cuda\n========= ERROR SUMMARY: 0 errors\n"
    races = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert sanitizer.errors("memcheck", clean) == 0
    assert sanitizer.errors("memcheck", "========= ERROR SUMMARY: 1 error\n") == 1
    assert sanitizer.errors("memcheck", "killed") is None
    assert sanitizer.errors("racecheck", races) == 1


def test_a_sanitizer_run_counts_as_clean_only_where_the_target_ran(tmp_path):
    of = here(tmp_path)
    clean = "sample ran as cuda\n========= ERROR SUMMARY: 0 errors\n"
    sanitizer.report(of, "memcheck", "sample", clean, 0, False)
    sanitizer.report(of, "memcheck", "sample", "========= ERROR SUMMARY: 0 errors\n", 0, False)
    sanitizer.report(of, "memcheck", "sample", "sample ran as cuda\n", 0, False)
    sanitizer.report(of, "memcheck", "sample", clean, -9, True)
    assert [x["row"]["ok"] for x in told(of) if "row" in x] == [True, False, False, False]
