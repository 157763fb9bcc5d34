"""What every test runs under."""

import os

import pytest

# Nothing here may reach for a model hub; both are read when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="rewrite the golden trajectories: make golden"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # `make test` runs without the assets, so a test that needs them belongs to the slow suite.
        if item.get_closest_marker("assets"):
            item.add_marker("slow")


@pytest.fixture
def write_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite the expected values instead of comparing with them."""
    return request.config.getoption("--write-golden")
