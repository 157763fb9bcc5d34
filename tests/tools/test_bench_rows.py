"""What a row of a measurement says of the commit and the device; git need not be there."""

import subprocess

from bench import rows


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_of_a_repository_and_whether_files_changed_since(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    name = rows.commit(tmp_path)
    assert len(name) == 12 and int(name, 16) >= 0
    (tmp_path / "file").write_text("two")
    assert rows.commit(tmp_path) == name + "+"
    inside = tmp_path / "copy"
    inside.mkdir()
    assert rows.commit(inside) == "unknown"  # the repository around it is another's


def test_without_git_the_commit_is_what_it_was_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MEAL_FAST_COMMIT", raising=False)
    assert rows.commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("0123456789ab\n")
    assert rows.commit(tmp_path) == "0123456789ab"
    monkeypatch.setenv("MEAL_FAST_COMMIT", "ba9876543210+")
    assert rows.commit(tmp_path) == "ba9876543210+"


def test_a_device_has_a_file_s_name():
    assert rows.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert rows.slug("NVIDIA H200") == "h200"
    assert rows.slug("NVIDIA GeForce RTX 4090") == "rtx-4090"
