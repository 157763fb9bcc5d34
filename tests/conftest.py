"""What every test runs under."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

from tools import reliability
from tools.interpreter import interpreter_obstacle

# Nothing here may reach for a model hub; both are read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Toy worlds are built anew in every session, here and in the processes that tests start, so that
# nothing depends on what another version left in the cache.
os.environ["MEAL_FAST_WORLDS"] = tempfile.mkdtemp(prefix="meal-fast-worlds-")
# Without a GPU kernels are interpreted, where they can be; triton reads this when one is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1" if interpreter_obstacle("1") is None else "0")

# The same examples in every run: a change is judged by its own failures. `--hypothesis-profile=new`
# looks for others.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False)
settings.load_profile("same")
# For tools/mutate.py: whether a test fails, without the search for its smallest failing example.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["MEAL_FAST_WORLDS"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="rewrite the golden values: make golden"
    )
    parser.addoption(
        "--reliability", metavar="FILE", help="write docs/reliability.md: make reliability"
    )


def pytest_configure(config: pytest.Config) -> None:
    if page := config.getoption("--reliability"):
        config.pluginmanager.register(reliability.Page(Path(page)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reliability.note_mark(item)
        # `make test` runs without the assets, so a test that needs them belongs to the slow suite.
        if item.get_closest_marker("assets"):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def interpreter() -> None:
    """Skip a test that has kernels interpreted where they cannot be."""
    if obstacle := interpreter_obstacle():
        pytest.skip(obstacle)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel's test runs: interpreted on the CPU, or compiled on a card."""
    if request.param == "cpu":
        request.getfixturevalue("interpreter")
    return request.param


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Both implementations of an op that is called with CPU tensors."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param


@pytest.fixture(autouse=True)
def threads_put_back():
    """A run sets the number of threads of its process, and how they add up."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, as the processes are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite the expected values instead of comparing with them."""
    return request.config.getoption("--write-golden")
