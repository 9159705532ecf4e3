"""Paths, and files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructmining_core import files


def test_an_installed_package_keeps_its_cache_with_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("INSTRUCTMINING_HOME", raising=False)
    assert files.cache() == files.root() / "results" / "cache", "in this checkout"
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages" / "x" / "files.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of the user"))
    monkeypatch.chdir(tmp_path)
    assert files.root() == tmp_path and files.results("p") == tmp_path / "results" / "p"
    cache = files.cache()
    assert cache.name == "instructmining" and not cache.is_relative_to(tmp_path / "results")
    monkeypatch.setenv("INSTRUCTMINING_HOME", str(tmp_path / "home"))
    assert files.cache() == tmp_path / "home" / "results" / "cache"


def test_file_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert files.file_sha256(tmp_path / "x") == known


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    files.write_atomic(path, "né\r\n")
    assert path.read_bytes() == "né\r\n".encode()
    with pytest.raises(KeyError), files.being_written(path) as part:
        part.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == "né\r\n".encode()
    assert [p.name for p in Path(path.parent).iterdir()] == ["a.txt"]
