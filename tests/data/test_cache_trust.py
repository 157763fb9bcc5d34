"""What lies in a cache is used where nobody else could have put it there, and where it is whole."""

import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from meal_fast import common
from meal_fast.data.assets import fetch, parts
from meal_fast.data.assets.parts import build_part, is_complete, seal
from meal_fast.data.toy import build_world
from meal_fast.ops import cuda_build
from tests.helpers.run_folder import build_run, tiny_config

posix = pytest.mark.skipif(os.name != "posix", reason="modes of files")
root = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="root gives files away")


def make(to: Path) -> None:
    (to / "sub").mkdir()
    (to / "sub" / "file").write_text("abc")
    (to / "sub" / "file").chmod(0o600)


@posix
@pytest.mark.reliability("attack", "a cache in which others may write, or of another user")
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777])
@pytest.mark.parametrize("place", ["", "sub", "sub/file", "manifest.json"])
def test_a_cache_that_others_may_write_is_not_trusted(tmp_path, mode, place):
    folder = tmp_path / "part"
    build_part(folder, {}, make)
    assert is_complete(folder)
    (folder / place).chmod(mode)
    with pytest.raises(ValueError, match="may be written by others; chmod -R go-w") as refused:
        is_complete(folder)
    assert "\n" not in str(refused.value)
    (folder / place).chmod(mode & 0o755)
    assert is_complete(folder)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match="may be written by others"):
        is_complete(folder)
    tmp_path.chmod(0o1777)  # as /tmp
    assert is_complete(folder)


@root
@pytest.mark.reliability("attack", "a cache in which others may write, or of another user")
@pytest.mark.parametrize("place", [".", "part", "part/sub/file"])
def test_a_cache_of_another_user_is_not_trusted(tmp_path, place):
    cache = tmp_path / "cache"
    build_part(cache / "part", {}, make)
    os.chown(cache / place, 65534, -1)
    with pytest.raises(ValueError, match="is of user 65534; name a folder of your own"):
        is_complete(cache / "part")


@posix
def test_a_new_cache_is_private_and_its_files_follow_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        cache = tmp_path / "cache"
        build_part(cache / "part", {}, make)
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
        assert stat.S_IMODE((cache / "part").stat().st_mode) == 0o755
        assert stat.S_IMODE((cache / "part/sub/file").stat().st_mode) == 0o644
        assert is_complete(cache / "part")
        os.umask(0o077)
        build_part(cache / "other", {}, make)
        assert stat.S_IMODE((cache / "other").stat().st_mode) == 0o700
    finally:
        os.umask(before)


@posix
def test_the_weights_of_a_policy_are_read_by_whom_the_umask_lets(tmp_path):
    build_run(tmp_path / "run", tiny_config())
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "run").rglob("*.safetensors")}
    (tmp_path / "any").touch()
    assert modes == {(tmp_path / "any").stat().st_mode & 0o777}


@pytest.mark.reliability("fault", "one flipped bit in a packaged weight, at the same size")
def test_a_flipped_bit_in_a_part_is_seen_and_made_anew(tmp_path):
    folder = tmp_path / "part"
    build_part(folder, {}, make)
    path = folder / "sub" / "file"
    path.write_text("abd")
    assert not is_complete(folder)
    assert build_part(folder, {}, make) and path.read_text() == "abc"
    # what an older version made has no digests until it is sealed
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert is_complete(folder)
    seal(folder)
    assert is_complete(folder)
    path.write_text("abd")
    assert not is_complete(folder)


@posix
@pytest.mark.reliability("attack", "a link laid where a lock or a temporary file will be")
def test_links_among_temporary_files_are_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(parts.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "mine").write_text("mine")
    build_part(tmp_path / "part", {}, make)
    (lock,) = (tmp_path / "tmp").iterdir()
    lock.unlink()
    lock.symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="remove it"):
        build_part(tmp_path / "part", {"other": 1}, make)
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "file.tmp").symlink_to(tmp_path / "mine")
    common.write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new"


def compiler(folder):
    """A program that stands where nvcc would: it writes a file, and says its version."""
    path = folder / "nvcc"
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if '-o' in sys.argv: open(sys.argv[sys.argv.index('-o') + 1], 'w').write('library')\n"
    )
    path.chmod(0o755)
    return str(path)


@posix
@pytest.mark.reliability("attack", "a compiled library that others could have laid in the cache")
def test_a_library_that_others_may_write_is_not_loaded(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MEAL_FAST_CACHE", str(cache))
    nvcc = compiler(tmp_path)
    name = next(p.stem for p in cuda_build.csrc().glob("*.cu"))
    library = cuda_build.build(name, "90a", nvcc)
    assert library.read_text() == "library"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert cuda_build.build(name, "90a", nvcc) == library
    library.write_text("damaged")  # which its digest tells
    assert cuda_build.build(name, "90a", nvcc).read_text() == "library"
    cuda_build.noted(library).unlink()  # and what has no digest was not built here
    library.write_text("planted")
    assert cuda_build.build(name, "90a", nvcc).read_text() == "library"
    for place in (library, cuda_build.noted(library), cache):
        mode = place.stat().st_mode
        place.chmod(mode | 0o022)
        with pytest.raises(ValueError, match="is not trusted"):
            cuda_build.build(name, "90a", nvcc)
        place.chmod(mode)
    assert cuda_build.build(name, "90a", nvcc) == library


@pytest.mark.reliability("attack", "wheels whose files would be unpacked elsewhere (zip slip)")
@pytest.mark.parametrize(
    "name",
    [
        "pyrit/../../out.csv",
        "/pyrit/out.csv",
        "pyrit/datasets/scorer_evals/../../../../../out.csv",
        "pyrit/datasets/scorer_evals/..\\..\\out.csv",
        "pyrit/datasets/scorer_evals/C:\\out.csv",
    ],
)
def test_wheels_are_unpacked_below_their_folder_alone(tmp_path, monkeypatch, name):
    wheel = tmp_path / "pyrit-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, "planted")
        link = zipfile.ZipInfo("pyrit/datasets/scorer_evals/link.csv")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    monkeypatch.setitem(fetch.WANTED, "pyrit", ("*.csv",))
    to = tmp_path / "a" / "b"
    to.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="unsafe file name"):
        fetch.extract(wheel, to)
    assert not [p for p in tmp_path.rglob("out.csv")]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    fetch.extract(wheel, to)
    (kept,) = (p for p in to.rglob("*") if not p.is_dir())
    assert not kept.is_symlink() and kept.read_text() == "/etc/passwd"


@pytest.mark.reliability("attack", "the place of the cache in what is saved and published")
def test_nothing_that_is_saved_names_a_folder_of_this_machine(tmp_path):
    from meal_fast import export

    place = str(build_world("tiny").parent)
    run = tmp_path / "run"
    build_run(run, tiny_config())
    for to in ("hub", "adapter"):
        export.main([str(run), "--to", to])
    for path in [*(run / "policy").rglob("*"), *(run / "export").rglob("*")]:
        if path.is_file():
            assert place.encode() not in path.read_bytes(), path
    ran = subprocess.run(["find", str(run), "-type", "l"], capture_output=True, text=True)
    assert ran.stdout == ""
