"""A server of a small run on a port of its own, as clients see it."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from meal_fast.config.run_dir import read_config
from tests.helpers.run_folder import build_run, tiny_config


@contextlib.contextmanager
def serving(folder, *, token=None, slots=4, waiting=4, ready=lambda served: None, **options):
    """Serves a run by uvicorn in a thread. `ready` may change what is served before it is."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from meal_fast.serving.app import application
    from meal_fast.serving.patience import configured
    from meal_fast.serving.run import ServedRun
    from meal_fast.serving.server import bound, names_of
    from meal_fast.serving.worker import Worker

    served = ServedRun(folder, read_config(folder))
    ready(served)
    taken: socket.socket = bound("127.0.0.1", 0)
    port = taken.getsockname()[1]
    worker = Worker(served, slots=slots, waiting=waiting)
    app = application(
        served, worker, hosts=names_of("127.0.0.1", port), token=token, max_new_tokens=8, **options
    )
    settings = configured(app, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        until(lambda: server.started)
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", port=port, worker=worker, served=served
        )
    finally:
        server.should_exit = True
        thread.join(20)
        taken.close()


def until(true, seconds=20.0):
    """Waits until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    policy = build_run(folder, tiny_config(), scale=0.3)
    return SimpleNamespace(folder=folder, policy=policy)


@pytest.fixture(scope="module")
def server(run):
    with serving(run.folder) as there:
        yield there
