"""Compiled kernels are read again by the next process."""

import dataclasses
import types

import pytest

# Not of "triton" itself: this folder has the name.
pytest.importorskip("triton.compiler", reason="triton is not installed")
from jla.triton import disk


@dataclasses.dataclass
class Result:
    binary: str
    ttgir: str
    llir: str
    shared_mem_bytes: int


def test_kept_by_everything_that_made_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []

    def compile_kernel(module, backend, options, capability):
        compiled.append(module)
        return Result(f"ptx of {module}", "long", "longer", 5)

    calls = [("a", 4, 80), ("b", 4, 80), ("a", 8, 80), ("a", 4, 90)]
    for again in range(2):
        run = disk.kept(compile_kernel, Result)  # as in a new process
        for module, warps, capability in calls:
            options = types.SimpleNamespace(num_warps=warps)
            made = run(module, None, options, capability)
            assert (made.binary, made.shared_mem_bytes) == (f"ptx of {module}", 5)
        assert len(compiled) == len(calls), again


def test_where_nothing_can_be_written_it_warns(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    run = disk.kept(lambda *_: Result("ptx", "", "", 5), Result)
    with pytest.warns(UserWarning, match="cannot be kept: .*TRITON_CACHE_DIR"):
        assert run("a", None, types.SimpleNamespace(), 80).binary == "ptx"
