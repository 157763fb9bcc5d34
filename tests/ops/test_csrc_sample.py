"""csrc/sample: its arithmetic on the CPU, built by a C++ compiler; nvcc's build where nvcc is."""

import ctypes
import logging
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

from meal_fast import ops
from meal_fast.ops import cuda_build, dispatch, philox, sample_cuda
from tests.helpers.sampler import OPTIONS, TIES, agree, keeps

HERE = __file__.rpartition("/")[0]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """tests/sample_host.cpp as a library; products and sums are left as they are written."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("csrc") / "sample.so"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    command = [compiler, *flags, "-shared", "-fPIC", f"-I{cuda_build.csrc()}"]
    subprocess.run([*command, f"{HERE}/sample_host.cpp", "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.host_uniform.restype = ctypes.c_double
    loaded.host_uniform.argtypes = [ctypes.c_uint64, ctypes.c_int64, ctypes.c_int64]
    p, i32, i64, f32, f64 = (
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_double
    )  # fmt: skip
    loaded.host_find.argtypes = [p, i32, f32, f64]
    loaded.host_sample.argtypes = [
        p, i64, i32, i64, i64, p, p, ctypes.c_uint64, f32, i32, i32, f64, f32, p, p, p
    ]  # fmt: skip
    return loaded


def on_host(host, logits, seed, row, position, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    r, v = logits.shape
    token = torch.full((r,), -1)
    logp, truncated = torch.full((2, r), math.nan)
    host.host_sample(
        logits.data_ptr(), r, v, *logits.stride(), row.data_ptr(), position.data_ptr(),
        seed % 2**64, 1 / temperature if temperature else 1.0, temperature == 0, min(top_k, v),
        top_p, min_p, token.data_ptr(), logp.data_ptr(), truncated.data_ptr(),
    )  # fmt: skip
    return token, logp, truncated


def test_the_uniforms_are_the_same_bits(host):
    big = 2**62
    row = torch.tensor([0, 1, -1, big + 5, -big, 2**32])
    position = torch.tensor([0, 2**32 + 1, 7, -3, 9, 2**31])
    for seed in (0, 1, -7, 2**40 + 3, 2**64 - 1):
        given = zip(row.tolist(), position.tolist(), strict=True)
        mine = [host.host_uniform(seed % 2**64, r, p) for r, p in given]
        assert mine == philox.uniform(seed, row, position).tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("v", [1, 2, 13, 300, 5001])
def test_tokens_are_those_of_the_plain_form(host, v, options):
    torch.manual_seed(v)
    logits = 3 * torch.randn(60, v)
    logits[::4] = (2 * logits[::4]).round() / 2  # ties
    if v > 7:
        logits[1::3, ::3] = -torch.inf
    row, position = torch.randint(-(2**62), 2**62, (2, 60))
    drawn = on_host(host, logits, -9, row, position, **options)
    plain = ops.sample(logits, seed=-9, row=row, position=position, **options)
    agree(logits, plain, drawn, -9, row, position, options)
    assert (plain[0] == drawn[0]).float().mean() > 0.9
    wide = torch.full((60, 2 * v + 3), math.nan)
    wide[:, 3::2] = logits
    view = on_host(host, wide[:, 3::2], -9, row, position, **options)
    assert all(torch.equal(a, b) for a, b in zip(drawn, view, strict=True))


@pytest.mark.parametrize(("logits", "options", "kept"), TIES)
def test_exact_ties_do_not_let_more_in(host, logits, options, kept):
    x, row = torch.tensor(logits), torch.arange(400)
    keeps(x, on_host(host, x.expand(400, -1), 3, row, row, **options), kept)


def test_rare_tokens_of_a_large_vocabulary_keep_their_share(host):
    logits = torch.zeros(1, 262_144)
    logits[:, 0] = math.log(262_143)  # half of the mass
    logits, row = logits.expand(50, -1), torch.arange(50)
    drawn = on_host(host, logits, 0, row, row)
    u = philox.uniform(0, row, row)
    exact = logits[0].double().exp().cumsum(0)
    expected = torch.searchsorted(exact, u * exact[-1], right=True)
    assert (drawn[0] - expected).abs().max() <= 1 and (drawn[0] > 0).sum() > 10


def test_the_ends_of_the_range_land_on_a_token_with_mass(host):
    x = torch.full((3000,), -torch.inf)
    x[300], x[2600] = 0.0, -40.0
    for mark, expected in ((0.0, 300), (1.0, 2600), (2.0, 2600)):
        assert host.host_find(x.data_ptr(), 3000, 0.0, mark) == expected


def test_a_row_that_is_no_distribution_is_nan_and_a_token_all_the_same(host):
    logits, row = torch.zeros(4, 20), torch.arange(4)
    logits[0, 3], logits[1], logits[2, 5] = math.nan, -torch.inf, torch.inf
    for options in ({}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
        token, logp, truncated = on_host(host, logits, 0, row, row, **options)
        assert ((token >= 0) & (token < 20)).all()
        assert logp.isnan().tolist() == truncated.isnan().tolist() == [True] * 3 + [False]


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("MEAL_FAST_CACHE", str(tmp_path))
    if cuda_build.nvcc() is None:
        pytest.skip("no nvcc")
    return cuda_build.nvcc()


def test_nvcc_builds_it_without_a_spill_and_torch_loads_it(compiler, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        library = cuda_build.build("sample", "90a", compiler)
    usage = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", caplog.text)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", caplog.text)]
    assert len(usage) == len(registers) == len(sample_cuda.KINDS), caplog.text
    assert set(usage) == {("0", "0")} and max(registers) <= 128, caplog.text
    stamp = library.stat().st_mtime_ns
    assert cuda_build.build("sample", "90a", compiler) == library
    assert library.stat().st_mtime_ns == stamp and library.parent == tmp_path
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    # In a process of its own: a library stays loaded. A torch without CUDA knows the op too.
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]);"
        "print(torch.ops.meal_fast_cuda.sample.default._schema)"
    )
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Tensor(a!) token" in done.stdout and done.stdout.strip().endswith("-> ()")


def test_a_compile_that_fails_says_why_and_leaves_nothing(compiler, tmp_path, monkeypatch):
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "sample.cu").write_text("#error planted\n")
    monkeypatch.setattr(cuda_build, "csrc", lambda: folder)
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1\n.*error: #error planted"):
        cuda_build.build("sample", "90a", compiler)
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    cuda_build.nvcc.cache_clear()
    yield
    monkeypatch.undo()
    cuda_build.nvcc.cache_clear()


class OnCuda:
    """What dispatch looks at of a tensor on a CUDA device, which need not be there."""

    device = torch.device("cuda")
    dtype = torch.float32


@pytest.mark.parametrize("toolkit", [None, "13.0"])
def test_cuda_is_the_default_where_it_can_be_built(monkeypatch, toolkit):
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: "nvcc")
    chosen = dispatch.choose_with_cuda("op", None, OnCuda())
    assert chosen == ("cuda" if toolkit else "triton")
    assert dispatch.choose_with_cuda("op", "torch", OnCuda()) == "torch"
    assert dispatch.choose_with_cuda("op", "triton", OnCuda()) == "triton"
    assert dispatch.choose_with_cuda("op", None, torch.zeros(1)) == "torch"


def test_without_a_compiler_triton_runs_and_the_log_says_so_once(no_compiler, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with caplog.at_level(logging.WARNING):
        assert dispatch.choose_with_cuda("op", None, OnCuda()) == "triton"
        assert dispatch.choose_with_cuda("op", None, OnCuda()) == "triton"
    assert [r.message for r in caplog.records] == [
        "nvcc is not here: what csrc/ has in CUDA C++ runs in Triton instead"
    ]
    with pytest.raises(ValueError, match=r"impl='cuda': op in CUDA C\+\+ needs nvcc, to be built"):
        dispatch.choose_with_cuda("op", "cuda", OnCuda())
    wide = OnCuda()
    wide.dtype = torch.float64
    assert dispatch.choose_with_cuda("op", None, wide) == "torch"
    with pytest.raises(ValueError, match=r"in CUDA C\+\+ computes in float32"):
        dispatch.choose_with_cuda("op", "cuda", wide)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_card(dtype, options):
    if cuda_build.nvcc() is None:
        pytest.skip("no nvcc")
    torch.manual_seed(0)
    for v in (1, 300, 49_152, 50_257):
        logits = (3 * torch.randn(64, v)).to(dtype)
        row, position = torch.randint(-(2**62), 2**62, (2, 64))
        plain = ops.sample(logits, seed=5, row=row, position=position, **options)
        drawn = ops.sample(
            logits.cuda(), seed=5, row=row.cuda(), position=position.cuda(), impl="cuda", **options
        )
        drawn = tuple(x.cpu() for x in drawn)
        agree(logits.float(), plain, drawn, 5, row, position, options)
