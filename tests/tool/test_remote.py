# SPDX-License-Identifier: Apache-2.0
"""A board over ssh: a real OpenSSH server on the loopback address, with keys of its own."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest

import isthmus
from isthmus.bench import Rules
from isthmus.bench_bundle import bench_on, read_measurements
from isthmus.bundle import Bundle
from isthmus.errors import IsthmusError, VerificationError
from isthmus.runtimes import remote
from isthmus.runtimes.remote import Host

MODELS = Path(__file__).parents[1] / "models"
QUICK = Rules(min_count=50, min_duration_s=0.02, percentile=90)


def silent(text: str, share: float | None) -> None:
    return None


@dataclass
class Server:
    """A running sshd and what a client needs to reach it; `home` is where its user's files go."""

    folder: Path
    port: int
    home: Path

    def host(self, **changes: object) -> Host:
        options = ("-F", "none", "-i", str(self.folder / "user"), "-o", f"UserKnownHostsFile={self.folder / 'known_hosts'}", "-o", "GlobalKnownHostsFile=none")
        return replace(Host(f"{getpass.getuser()}@127.0.0.1", self.port, sys.executable, options), **changes)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, require) -> Iterator[Server]:
    sshd = require("sshd")
    folder, home, libraries = tmp_path_factory.mktemp("sshd"), tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("libraries")
    # The board "has" numpy and the engine already: the test of what is fetched from an index is the slow one below.
    installed = Path(numpy.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "packaging", "google", "sympy", "mpmath"):
        (libraries / name).symlink_to(installed / name)
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        textwrap.dedent(f"""\
        Port {port}
        ListenAddress 127.0.0.1
        HostKey {folder}/host
        AuthorizedKeysFile {folder}/authorized_keys
        PidFile {folder}/pid
        StrictModes no
        UsePAM no
        PasswordAuthentication no
        SetEnv HOME={home} PYTHONPATH={libraries} PIP_CACHE_DIR={os.environ.get("PIP_CACHE_DIR", Path.home() / ".cache/pip")}
        """)
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it; its service makes it elsewhere
    process = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=(folder / "log").open("w"))
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    known = f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}"
    (folder / "known_hosts").write_text(known)
    yield Server(folder, port, home)
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return isthmus.compile(MODELS / "network.onnx", targets=["cpu", "rpi5"], tune=False, output=tmp_path_factory.mktemp("remote") / "bundle")


def test_a_bundle_travels_and_its_measurement_comes_home(server, bundle):
    said = []
    opened, found = bench_on(bundle, ["cpu"], server.host(), QUICK, say=lambda text, share: said.append(text))
    measurement = found["cpu"]
    assert measurement.valid and measurement.count >= 64
    assert {"governor", "clock_khz", "cpu_model", "before", "after"} <= set(measurement.conditions)
    assert measurement.conditions["measured_over_ssh_on"] == server.host().address
    assert read_measurements(Bundle.open(opened.root))["cpu"].to_json() == measurement.to_json()
    assert "verifying" in " ".join(said)
    placed = [path.name.partition("-")[0] for path in (server.home / remote.ROOT).iterdir()]
    assert sorted(placed) == ["bundle", "env", "incoming", "wheel"]
    assert not list((server.home / remote.ROOT / "incoming").iterdir())
    sent = []
    bench_on(bundle, ["cpu"], server.host(), QUICK, say=lambda text, share: sent.append(text))
    assert not any("sending" in text for text in sent), "what is there already is not sent again"


def test_a_wrong_host_key_is_refused(server, bundle, tmp_path):
    other = (server.folder / "other.pub").read_text()
    (tmp_path / "changed").write_text(f"[127.0.0.1]:{server.port} {other}")
    (tmp_path / "empty").write_text("")
    for file, message in (("changed", "its host key is not the one this machine knows"), ("empty", "its host key is not known here")):
        options = tuple(word.replace(str(server.folder / "known_hosts"), str(tmp_path / file)) for word in server.host().options)
        with pytest.raises(IsthmusError, match=message):
            bench_on(bundle, ["cpu"], server.host(options=options), QUICK, say=silent)


def test_a_user_without_a_key_is_told_so(server, bundle):
    options = tuple(word.replace(str(server.folder / "user"), str(server.folder / "other")) for word in server.host().options)
    with pytest.raises(IsthmusError, match="does not let this user in"):
        bench_on(bundle, ["cpu"], server.host(options=(*options, "-o", "IdentitiesOnly=yes")), QUICK, say=silent)


CUT = """
import os, socket, sys, threading
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
left = int(sys.argv[2])
def home():
    while data := connection.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=home, daemon=True).start()
while data := os.read(0, 4096):
    left -= len(data)
    if left < 0:
        os._exit(1)
    connection.sendall(data)
"""


def test_a_transfer_that_is_cut_goes_on_where_it_stopped(server, tmp_path):
    content = os.urandom(3_000_000)
    digest = remote._digest(content)
    (tmp_path / "cut.py").write_text(CUT)
    host = server.host()
    remote._board(host, ["look", remote.ROOT, digest, str(len(content))], 60)
    cut = replace(host, options=(*host.options, "-o", f"ProxyCommand={sys.executable} {tmp_path / 'cut.py'} {server.port} 1000000"))
    with pytest.raises(IsthmusError, match="the transfer was cut: the same command goes on where it stopped"):
        remote._send(cut, digest, content, 0, silent)
    have, before = 0, -1
    for _ in range(50):  # the server writes what it has received after the client is gone: until it grows no more
        have, before = int(remote._board(host, ["look", remote.ROOT, digest, str(len(content))], 60)["have"][digest]), have
        if have and have == before:
            break
        time.sleep(0.05)
    assert 100_000 < have < len(content)
    remote._send(host, digest, content, have, silent)
    arrived = server.home / remote.ROOT / "incoming" / digest
    assert arrived.read_bytes() == content
    arrived.write_bytes(b"\0" * len(content))
    assert remote._board(host, ["look", remote.ROOT, digest, str(len(content))], 60)["have"][digest] == 0, "damaged: begin again"


def test_what_the_board_computes_wrongly_is_found(server, bundle, tmp_path):
    copy = shutil.copytree(bundle.root, tmp_path / "bundle")
    golden = dict(bundle.golden())
    (name,) = (name for name in golden if name.startswith("output/"))
    golden[name] = golden[name] ^ 1
    numpy.savez_compressed(copy / "golden.npz", **golden)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = remote._digest((copy / "golden.npz").read_bytes())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"cpu on .*differs from the reference"):
        bench_on(Bundle.open(copy), ["cpu"], server.host(), QUICK, say=silent)


def test_another_board_than_the_profiles_is_refused(server, bundle):
    with pytest.raises(IsthmusError, match=r"the profile rpi5 is for aarch64: a figure of it would carry a wrong name"):
        bench_on(bundle, ["rpi5"], server.host(), QUICK, say=silent)
    with pytest.raises(IsthmusError, match="name it with --target"):
        bench_on(bundle, [], server.host(), QUICK, say=silent)


def test_a_python_that_is_not_there(server, bundle):
    with pytest.raises(IsthmusError, match="no-such-python"):
        bench_on(bundle, ["cpu"], server.host(python="no-such-python"), QUICK, say=silent)


@pytest.mark.parametrize("address", ["", "-oProxyCommand=touch /tmp/x", "a b", "a;b", "user@-x", "$(id)", "a`b`", "user@host:22 x"])
def test_an_address_that_is_none(address):
    with pytest.raises(IsthmusError, match="expected user@board"):
        Host(address)


def test_words_are_quoted(server):
    code, reply = remote._json(server.host(), ["sh", "-c", 'printf \'{"x": "%s"}\' "$1"', "sh", "$(id) ; `id` 'a b' *"], 60)
    assert (code, reply) == (0, {"x": "$(id) ; `id` 'a b' *"})


@pytest.mark.slow
def test_a_board_gets_its_engine_installed(server, bundle):
    """numpy and the engine come from the package index, into an environment of the board's own."""
    bare = server.folder / "bare-python"
    bare.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {sys.executable} "$@"\n')
    bare.chmod(0o755)
    shutil.rmtree(server.home / remote.ROOT, ignore_errors=True)
    _, found = bench_on(bundle, ["cpu"], server.host(python=str(bare)), QUICK, say=silent)
    (environment,) = (server.home / remote.ROOT).glob("env-*")
    assert list(environment.glob("lib/python3*/site-packages/onnxruntime"))
    assert found["cpu"].valid and found["cpu"].conditions["engine"] == "onnxruntime"


# ---- an artifact that only the board can build
JETSON = "jetson-orin-nano"
# TensorRT-RTX under TensorRT's name: it really builds. It waits while a file `hold` is there, so that a connection can be cut in the middle.
STAND_IN = """
import __main__, pathlib, time
import tensorrt_rtx
from tensorrt_rtx import *

__version__ = "10.3.0"
__main__.gpu_here = lambda: {"name": "stand-in", "sm": 87, "multiprocessors": 8}
__main__.free_bytes = lambda: 2**32


class Builder(tensorrt_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM86, 0)
        pathlib.Path(HOME, "begun").touch()
        while pathlib.Path(HOME, "hold").exists():
            time.sleep(0.05)
        return config
"""


@pytest.fixture
def jetson(server, require, tmp_path) -> Iterator[Bundle]:
    """A bundle for a Jetson that says it runs on any processor, and TensorRT on the board."""
    require("tensorrt_rtx")
    libraries = Path((server.folder / "sshd_config").read_text().partition("PYTHONPATH=")[2].split()[0])
    installed = Path(numpy.__file__).parents[1]
    for folder in installed.glob("tensorrt_rtx*"):
        if folder.is_dir() and not (libraries / folder.name).exists():
            (libraries / folder.name).symlink_to(folder)
    (libraries / "tensorrt.py").write_text(f"HOME = {str(server.home)!r}\n{STAND_IN}")
    made = isthmus.compile(MODELS / "conv_relu.onnx", targets=[JETSON], output=tmp_path / "bundle")
    entry = {**made.artifact(JETSON), "arch": "any"}
    yield Bundle(made.root, {**made.manifest, "artifacts": {JETSON: entry}})
    (libraries / "tensorrt.py").unlink()
    for name in ("hold", "begun"):
        (server.home / name).unlink(missing_ok=True)


def build_logs(server: Server) -> dict[str, str]:
    return {log.name: log.read_text() for log in (server.home / remote.ROOT).glob(f"bundle-*/artifacts/{JETSON}/logs/build-*.log")}


def test_a_connection_that_is_cut_leaves_a_build_that_goes_on(server, jetson):
    """The engines are built and sealed there; the next command finds them. What runs them needs a GPU, and says so."""
    (server.home / "hold").touch()
    said, raised = [], []

    def measured() -> None:
        try:
            bench_on(jetson, [JETSON], server.host(), QUICK, say=lambda text, share: said.append(text))
        except IsthmusError as error:
            raised.append(str(error))

    worker = threading.Thread(target=measured)
    worker.start()
    deadline = time.monotonic() + 120
    while not (server.home / "begun").exists() and worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    cut_connections(int((server.folder / "pid").read_text()))
    worker.join(60)
    assert any("building the engines, which takes minutes the first time" in text for text in said)
    assert len(raised) == 1 and raised[0].endswith("; the build goes on there: the same command waits for it and goes on from it"), raised
    (server.home / "hold").unlink()
    with pytest.raises(IsthmusError, match=r"CUDA|libcuda"):
        bench_on(jetson, [JETSON], server.host(), QUICK, say=silent)
    (engine,) = (server.home / remote.ROOT).glob(f"bundle-*/artifacts/{JETSON}/model.engine")
    assert {f"{engine.name}{suffix}" for suffix in ("", ".json", ".seal", ".trtexec")} <= {path.name for path in engine.parent.iterdir()}
    logs = build_logs(server)
    assert logs.keys() == {"build-int8.log", "build-fp16.log"}
    assert "model.engine is there already: int8" in logs["build-int8.log"], "the first build went on and was not done twice"


def cut_connections(sshd: int) -> None:
    """Ends the processes that serve connections of this test's own server, as a lost network would."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == sshd:
            os.kill(int(stat.parent.name), signal.SIGKILL)
