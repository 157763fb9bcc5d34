"""What every test runs under."""

import os

import pytest
import torch
from hypothesis import Phase, settings

# Nothing here may reach for a model hub; both are read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without a GPU the kernels are interpreted; triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: a change is judged by its own failures. `--hypothesis-profile=new`
# looks for others.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False)
settings.load_profile("same")
# For tools/mutate.py: whether a test fails, without the search for its smallest failing example.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="rewrite the golden trajectories: make golden"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # `make test` runs without the assets, so a test that needs them belongs to the slow suite.
        if item.get_closest_marker("assets"):
            item.add_marker("slow")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel's test runs: interpreted on the CPU, or compiled on a card."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here")
    return request.param


@pytest.fixture
def write_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite the expected values instead of comparing with them."""
    return request.config.getoption("--write-golden")
