"""Checkpoints that several processes save together, and any number of processes reads."""

import json
import os
from pathlib import Path

import pytest

from meal_fast.config.config import to_dict
from meal_fast.training.checkpoint import Checkpoints
from tests.helpers import checkpoint_process as process
from tests.helpers.ranks import Ranks

LIMIT = 240  # seconds of a start


def together(out: Path, mode: str, world: int) -> list[tuple[int, dict[str, str]]]:
    """Run so many processes to their end: exit code, and what each saw."""
    said = out.with_name(f"{mode}-{world}")
    with Ranks(said, str(out), mode, world=world) as ranks:
        ranks.module = "tests.helpers.checkpoint_process"
        codes = ranks.start().wait(LIMIT)
        lines = [[x for x in ranks.said(r).splitlines() if x[:1] == "{"] for r in range(world)]
        assert all(lines[r] or code < 0 for r, code in enumerate(codes)), ranks.said()
    seen = [json.loads(line[-1]) if line else {} for line in lines]
    return list(zip(codes, seen, strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that two processes saved three times into; and what they saw."""
    out = tmp_path_factory.mktemp("runs") / "run"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(to_dict(process.CONFIG)))
    (out / "metrics.jsonl").touch()
    return out, together(out, "save", 2)


@pytest.mark.reliability("fault", "a full disk of one process, and NaN on one, while two save")
def test_what_goes_wrong_in_one_is_raised_in_all(written):
    out, found = written
    assert [code for code, _ in found] == [0, 0]
    for _, seen in found:
        assert seen["nan"].startswith("ValueError: meta-step 4: parameters or Adam's state are not")
        assert seen["other"].startswith("ValueError: the processes do not agree on experience/")
        assert seen["full"] == "OSError: [Errno 28] No space left on device"
        assert seen["latest"] == "None"
    assert (out / "ckpt/LATEST").read_text() == "step-3\n"
    assert {p.name for p in (out / "ckpt").iterdir()} == {"LATEST", "step-2", "step-3"}


def test_what_all_have_is_written_once_and_parts_by_their_holders(written):
    out, _ = written
    manifest = json.loads((out / "ckpt/step-3/manifest.json").read_text())
    assert manifest["world"] == 2 and manifest["step"] == 3
    assert set(manifest["parts"]) == {"rank-00000.safetensors", "rank-00001.safetensors"}
    chunks = {name: table["chunks"] for name, table in manifest["tensors"].items()}
    assert [len(chunks[f"outer/theta/{i}"]) for i in range(6)] == [2, 2, 1, 1, 2, 2]
    assert all(len(held) == 1 for name, held in chunks.items() if name.startswith("outer/by/"))
    held = [
        sum(p.stat().st_size for p in (out / "ckpt/step-3").glob(f"rank-0000{r}*")) for r in (0, 1)
    ]
    assert max(held) < 3 * min(held)


@pytest.mark.reliability("fault", "saved by 2 processes, gone on with by 1 and 2")
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_reads_it(written, world):
    out, _ = written
    if world == 1:
        found = Checkpoints(out).open(process.CONFIG)
        process.check(found, 1.0, 2)
        assert (found.step, found.tokens) == (3, 5)
    else:
        assert together(out, "load", world) == [(0, {"step": 3})] * world


@pytest.mark.reliability("fault", "kill -9 of one of two processes while they write a checkpoint")
def test_a_process_that_dies_while_writing(written):
    out, _ = written
    first, second = together(out, "killed", 2)
    assert second[0] == -9 and first[0] == 3
    assert first[1]["killed"].startswith("ProcessLost: rank 0 of 2: a checkpoint cannot be written")
    assert float(first[1]["after"]) < 60
    found = Checkpoints(out).open(process.CONFIG)
    assert found.step == 3
    process.check(found, 1.0, 2)
    assert not [p for p in out.rglob("*.tmp") if os.path.isfile(p)]
