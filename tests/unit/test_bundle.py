# SPDX-License-Identifier: Apache-2.0
"""Bundles: whole or absent, every file checked, nothing outside the folder, native code only of one's own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.bundle import MANIFEST, SEAL, Bundle, BundleWriter
from isthmus.errors import IsthmusError

ENTRY = {
    "target": "null",
    "artifact": "model.bin",
    "engine": "null",
    "inputs": [],
    "outputs": [],
    "runs_here": False,
    "max_lsb_allowed": 0,
    "float_tolerance": 1e-5,
}


@pytest.fixture(autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))


def _write(place: Path, content: bytes = b"engine", force: bool = False) -> Bundle:
    with BundleWriter(place, force) as writer:
        (writer.folder / "model.onnx").write_bytes(b"form")
        np.savez(writer.folder / "golden.npz", label=np.zeros(3, np.int64))
        (writer.folder / "artifacts" / "b").mkdir()
        (writer.folder / "artifacts" / "b" / "model.bin").write_bytes(content)
        return writer.commit(writer.seal({"isthmus": "0", "graph": {}, "artifacts": {"b": ENTRY}}))


def _edit(place: Path, **changes: Any) -> None:
    manifest = json.loads((place / MANIFEST).read_bytes())
    (place / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_a_written_bundle_opens(tmp_path: Path) -> None:
    written = _write(tmp_path / "out")
    opened = Bundle.open(tmp_path / "out")
    assert opened.manifest == written.manifest
    assert set(opened.manifest["files"]) == {"model.onnx", "golden.npz", "artifacts/b/model.bin"}
    assert opened.built_here()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "out") as writer:
        (writer.folder / "model.onnx").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_needs_force_and_is_replaced_whole(tmp_path: Path) -> None:
    _write(tmp_path / "out", b"old")
    with pytest.raises(IsthmusError, match="exists; pass --force"):
        _write(tmp_path / "out", b"new")
    assert (Bundle.open(tmp_path / "out").folder("b") / "model.bin").read_bytes() == b"old"
    _write(tmp_path / "out", b"new", force=True)
    assert (Bundle.open(tmp_path / "out").folder("b") / "model.bin").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(IsthmusError, match="is no bundle"):
        _write(tmp_path / "thesis", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(IsthmusError, match="is a file"):
        _write(tmp_path / "file", force=True)


def test_a_killed_compile_leaves_the_old_bundle(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing; the next compile also clears what the killed one left."""
    _write(tmp_path / "out", b"old")
    script = """
        import sys, time
        from isthmus.bundle import BundleWriter
        with BundleWriter(sys.argv[1], force=True) as writer:
            (writer.folder / "model.onnx").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (Bundle.open(tmp_path / "out").folder("b") / "model.bin").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    _write(tmp_path / "out", b"new", force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_killed_at_any_moment_there_is_a_whole_bundle(tmp_path: Path) -> None:
    """Compiles that replace each other are killed at random moments: what is in place always opens."""
    script = """
        import sys
        from isthmus.bundle import BundleWriter
        entry = {"target": "null", "artifact": "model.bin", "engine": "null", "inputs": [], "outputs": [],
                 "runs_here": False, "max_lsb_allowed": 0, "float_tolerance": 1e-5}
        print("go", flush=True)
        while True:
            with BundleWriter(sys.argv[1], force=True) as writer:
                (writer.folder / "model.onnx").write_bytes(b"form")
                (writer.folder / "artifacts" / "b").mkdir()
                (writer.folder / "artifacts" / "b" / "model.bin").write_bytes(b"x" * 1000)
                writer.commit(writer.seal({"graph": {}, "artifacts": {"b": entry}}))
    """
    _write(tmp_path / "out")
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"go\n"
        time.sleep(0.01 + 0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        Bundle.open(tmp_path / "out")


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "artifacts/b/model.bin"])
def test_a_changed_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "out")
    file = tmp_path / "out" / name
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(IsthmusError, match=f"{name} is not what was compiled"):
        Bundle.open(tmp_path / "out")
    file.unlink()
    with pytest.raises(IsthmusError, match=f"{name} is missing"):
        Bundle.open(tmp_path / "out")


def test_golden_samples_that_a_stranger_damaged_and_hashed_anew_are_named(tmp_path: Path) -> None:
    bundle = _write(tmp_path / "out")
    np.testing.assert_array_equal(bundle.golden()["label"], np.zeros(3))
    file = tmp_path / "out" / "golden.npz"
    file.write_bytes(file.read_bytes()[:-30])
    _edit(tmp_path / "out", files={**bundle.manifest["files"], file.name: hashlib.sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(IsthmusError, match=r"golden\.npz: cannot be read as a \.npz file"):
        Bundle.open(tmp_path / "out").golden()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "", "nul\0"])
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "out")
    (tmp_path / "secret").write_text("x")
    _edit(tmp_path / "out", files={name: "0" * 64})
    with pytest.raises(IsthmusError, match="no path inside the bundle"):
        Bundle.open(tmp_path / "out")


def test_a_link_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").unlink()
    (tmp_path / "out" / "model.onnx").symlink_to("/etc/hostname")
    with pytest.raises(IsthmusError, match="behind a link"):
        Bundle.open(tmp_path / "out")


def test_an_unknown_schema_names_who_can_read_it(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    _edit(tmp_path / "out", schema=7, isthmus="9.9")
    with pytest.raises(IsthmusError, match=r"schema 7; this version reads schema 1: use the isthmus that wrote it \(9\.9\)"):
        Bundle.open(tmp_path / "out")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="no such bundle"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(IsthmusError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IsthmusError, match="cannot be written"):
        _write(tmp_path / "file" / "inside")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses to write past a size limit, as it does on a full disk (same error path, OSError)."""
    script = """
        import resource, signal, sys
        from isthmus.bundle import BundleWriter
        from isthmus.errors import IsthmusError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with BundleWriter(sys.argv[1]) as writer:
                (writer.folder / "model.onnx").write_bytes(b"x" * 100000)
        except IsthmusError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert "out: cannot be written: File too large; nothing half-written is left" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_added_and_checked(tmp_path: Path) -> None:
    _write(tmp_path / "out").add_report("report.html", b"<p>")
    opened = Bundle.open(tmp_path / "out")
    assert "reports/report.html" in opened.manifest["files"]
    assert opened.built_here()
    (tmp_path / "out" / "reports" / "report.html").write_bytes(b"<script>")
    with pytest.raises(IsthmusError, match=r"reports/report\.html is not what was compiled"):
        Bundle.open(tmp_path / "out")


def test_a_bundle_somebody_else_built_has_no_seal_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "out")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another-user"))
    assert not Bundle.open(tmp_path / "out").built_here()
    _write(tmp_path / "own", b"mine")
    assert Bundle.open(tmp_path / "own").built_here()
    assert not Bundle.open(tmp_path / "out").built_here()
    (tmp_path / "out" / SEAL).write_bytes((tmp_path / "own" / SEAL).read_bytes())
    assert not Bundle.open(tmp_path / "out").built_here()
    # A report added by somebody else's hand does not seal the rest.
    assert not Bundle.open(tmp_path / "out").add_report("x.json", b"{}").built_here()


def test_an_unknown_profile_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="no artifact for 'c', there are b"):
        _write(tmp_path / "out").artifact("c")
    with pytest.raises(IsthmusError, match="needs the board"):
        _write(tmp_path / "out2").open_session("b")
    with pytest.raises(IsthmusError, match="threads: expected at least 1, found 0"):
        _write(tmp_path / "out3").open_session("b", threads=0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    manifest=st.one_of(JSON, st.fixed_dictionaries({"schema": st.just(1)}, optional={"files": JSON, "artifacts": JSON, "graph": JSON})),
    raw=st.binary(max_size=40),
    as_bytes=st.booleans(),
)
def test_any_manifest_opens_or_is_named(tmp_path_factory: pytest.TempPathFactory, manifest: Any, raw: bytes, as_bytes: bool) -> None:
    place = tmp_path_factory.mktemp("bundle")
    (place / MANIFEST).write_bytes(raw if as_bytes else json.dumps(manifest).encode())
    try:
        Bundle.open(place)
    except IsthmusError as error:
        assert str(place) in str(error) or "artifact" in str(error)
