"""Which implementation runs where; what cannot be met is refused in one line."""

import importlib.metadata
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from meal_fast.ops import dispatch
from tools.interpreter import interpreter_obstacle

CPU = torch.zeros(2)


@pytest.fixture
def on_cuda():
    """A tensor on a CUDA device that need not be there."""
    with FakeTensorMode():
        return torch.zeros(2, device="cuda")


def test_the_cpu_runs_torch_and_the_interpreter_on_request(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("op", None, CPU) == "torch"
    assert dispatch.choose("op", "torch", CPU) == "torch"
    assert dispatch.choose("op", "triton", CPU, None, CPU) == "triton"


def test_a_cuda_tensor_runs_triton_where_it_is_installed(monkeypatch, on_cuda):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.choose("op", None, on_cuda) == "triton"
    assert dispatch.choose("op", "torch", on_cuda) == "torch"
    assert dispatch.choose("op", None, on_cuda.double()) == "torch"


def test_a_cuda_tensor_runs_torch_where_triton_is_not_installed(monkeypatch, on_cuda):
    monkeypatch.setitem(sys.modules, "triton", None)
    dispatch.triton_installed.cache_clear()
    try:
        assert dispatch.choose("op", None, on_cuda) == "torch"
        with pytest.raises(ValueError, match="impl='triton': op in Triton needs the package tri"):
            dispatch.choose("op", "triton", on_cuda)
    finally:
        dispatch.triton_installed.cache_clear()


def test_what_cannot_be_met_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton': op in Triton needs a CUDA tensor, or TRI"):
        dispatch.choose("op", "triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="op in Triton computes in float32"):
        dispatch.choose("op", "triton", CPU, None, CPU.double())
    assert dispatch.choose("op", None, CPU.double()) == "torch"
    with pytest.raises(ValueError, match="in Triton does not run on meta"):
        dispatch.choose("op", "triton", CPU.to("meta"))
    with pytest.raises(ValueError, match="impl='cuda': op has none such here"):
        dispatch.choose("op", "cuda", CPU)
    with pytest.raises(ValueError, match="impl='jax': choose from torch, triton, cuda"):
        dispatch.choose("op", "jax", CPU)


def test_tests_of_interpreted_kernels_know_where_they_cannot_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    versions = {"triton": "3.6.0", "numpy": "2.3.5"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert interpreter_obstacle() == "Triton compiles here: TRITON_INTERPRET is not 1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreter_obstacle() is None
    versions["numpy"] = "2.10.0rc1"
    assert "does not work with numpy 2.4 or later" in interpreter_obstacle()
    versions["triton"] = "3.7.0"
    assert interpreter_obstacle() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert interpreter_obstacle() == "triton is not installed"
