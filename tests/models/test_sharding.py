"""Weights that several processes hold together, by real processes: tests/helpers/in_parts.py."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meal_fast.config.config import PolicyConfig
from meal_fast.data.toy import build_world
from meal_fast.models.policy import load_policy
from meal_fast.models.sharding import whole
from meal_fast.models.shards import Held, gathered, local, part_of
from tests.helpers import in_parts

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "helpers" / "in_parts.py"


def launched(processes: int, folder: Path, copies: int, limit: float) -> list[dict[str, str]]:
    """What each process found: of each check the empty string, or how it failed."""
    build_world("tiny")  # before several would
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    process = subprocess.Popen(
        [*command, str(PROGRAM), str(folder), str(copies)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    files = [folder / f"{rank}.json" for rank in range(processes)]
    assert all(file.is_file() for file in files), said[-3000:]
    found = [json.loads(file.read_text()) for file in files]
    assert process.returncode == 0, (said[-3000:], [list(f)[-1] for f in found])
    return found


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launched(2, tmp_path_factory.mktemp("two"), copies=1, limit=240)


@pytest.mark.parametrize("name", list(in_parts.CHECKS))
def test_two_processes(of_two, name):
    assert [found[name] for found in of_two] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 2])
def test_four_processes(tmp_path, copies):
    found = launched(4, tmp_path, copies, limit=600)
    assert list(found[0]) == list(in_parts.CHECKS)
    assert [name for of_one in found for name, failed in of_one.items() if failed] == []


def test_a_policy_of_one_process_is_whole():
    policy = load_policy(PolicyConfig(path="world:tiny", tuning="lora", device="cpu"), ("a", "b"))
    with whole(policy), policy.merged() as network:
        assert network.body is policy.causal_lm.base_model
    policy.reshard()
    policy.end_update()
    assert not policy.in_parts


def test_parameters_of_one_process_are_themselves():
    parameters = [torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.ones(1))]
    held = Held(parameters)
    assert all(a is b for a, b in zip(held.local, parameters, strict=True))
    assert (
        local(parameters[0]) is parameters[0] and part_of(parameters[0], parameters[0]) is not None
    )
    assert torch.equal(gathered(parameters[0]), parameters[0])
    assert float(held.norm([torch.tensor([3.0, 0.0]), torch.tensor([4.0])])) == 5
    parameters[0].grad = torch.tensor([3.0, 4.0])
    held.take_gradients()
    assert float(held.clip(1.0)) == 5
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.8]))
