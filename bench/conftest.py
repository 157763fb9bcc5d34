"""`pytest bench/ --benchmark-only --rows`: what was measured, as rows of bench/results/."""

from __future__ import annotations

import pytest
import torch

from bench import rows

COMMIT = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", action="store_true", help="append to bench/results/DEVICE.jsonl")


def pytest_configure(config: pytest.Config) -> None:
    # Before anything runs: what is committed then is what is measured.
    config.stash[COMMIT] = rows.commit() if config.getoption("--rows") else ""


def device_name() -> str:
    """cpu, or the card's model: h200."""
    return rows.slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if not config.getoption("--rows"):
        return
    common = {
        "date": rows.now(),
        "commit": config.stash[COMMIT],
        "command": "pytest bench/ --benchmark-only --rows",
        "machine": rows.machine(),
        "versions": rows.versions(
            "torch", "triton", "trl", "liger_kernel", "cut-cross-entropy", "transformers"
        ),
    }
    measured = [
        {"bench": bench.extra_info["op"], **common, "test": bench.name, **bench.extra_info}
        for bench in config._benchmarksession.benchmarks
        if not bench.has_error and "op" in bench.extra_info
    ]
    path = rows.RESULTS / f"{device_name()}.jsonl"
    rows.append(path, measured)
    print(f"\n{len(measured)} rows to {path}")
