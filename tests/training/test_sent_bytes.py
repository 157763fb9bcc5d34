"""What the cost model says that processes send, beside what they count that they sent."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast.config import from_dict, preset
from meal_fast.config.cost import cost
from meal_fast.config.hardware import CARDS
from meal_fast.config.mesh import layout
from meal_fast.config.model_shape import shape_of
from meal_fast.config.workload import work_of

ROOT = Path(__file__).resolve().parents[2]
PROCESS = """
import json, sys
from pathlib import Path
from meal_fast.config import from_dict, preset
from meal_fast.training.distributed import start
from meal_fast.training.trainer import Trainer

config = from_dict(json.loads(sys.argv[1]), preset("tiny"))
mesh, out = start(config), Path(sys.argv[2])
Trainer(config, out / "run", mesh=mesh).train()
(out / f"sent-{mesh.rank}.json").write_text(json.dumps(mesh.sent))
mesh.close()
"""
# What goes with the sums: four figures of a task, and the loss and its likes of an update.
SIDE = 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"meta": {"tasks": 2}}),
        (2, {"meta": {"tasks": 2}, "policy": {"tuning": "full"}, "mesh": {"data": 2}}),
        (4, {"meta": {"tasks": 3}, "mesh": {"groups": 2, "data": 2}}),
    ],
)
def test_bytes_that_processes_send_are_those_of_the_model(world, options, tmp_path):
    options["meta"] |= {"steps": 1}
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(script)]
    done = subprocess.run(
        [*command, json.dumps(options), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sent = [json.loads((tmp_path / f"sent-{rank}.json").read_text()) for rank in range(world)]
    config = from_dict(options, preset("tiny"))
    laid = layout(config, world)
    said = cost(work_of(config), shape_of("world:tiny"), CARDS["cpu"], laid)
    updates = config.meta.tasks * config.meta.n_inner / laid.groups
    for kind, name, sums in (
        ("across", "deltas between groups", 1),
        ("group", "gradients, in a group", updates),
    ):
        mean = sum(one[kind] for one in sent) / world
        # The busiest group's updates are counted: of three tasks in two groups, those of two.
        busiest = -(-config.meta.tasks // laid.groups) * config.meta.n_inner
        wanted = said.wire[name] * (updates / busiest if kind == "group" else 1)
        assert wanted <= mean <= wanted + SIDE * sums, (kind, mean, wanted)
    assert sum(one["across"] + one["group"] for one in sent) > 0
