# SPDX-License-Identifier: Apache-2.0
"""The device package on an emulated 64-bit ARM: runs a bundle's .tflite there and compares every element with the host's golden outputs.

    make test-arm64        (or: python tests/arm64/emulate.py [--bundle DIR] [--work DIR] [--transcript docs/arm64.md])

Needs root (debootstrap), Debian's qemu-user-static and debootstrap, and a network: a minimal arm64 Debian, aarch64 wheels of numpy and LiteRT
from the package index. The Debian is unpacked and its Python started by qemu with it as prefix: nothing is entered, mounted or registered.
Emulated time says nothing about a board: only the numbers are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from isthmus.runtimes.remote import runtime_wheel

MIRROR = "http://deb.debian.org/debian"
SUITE = "bookworm"  # Raspberry Pi OS of the same name: Python 3.11, glibc 2.36
PACKAGES = "python3,libstdc++6,libgcc-s1"
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
# LiteRT 2.2.0 and 2.3.0 end with a segmentation fault under qemu 7.2 as soon as an interpreter is made, XNNPACK or not; 2.1.6 runs. On a board
# nobody has tried them for this project.
WHEELS = ("numpy==2.4.6", "ai-edge-litert==2.1.6")
# The cores of a Raspberry Pi 5 (with the int8 dot product) and 4 (without). Not qemu's own "max" (SVE2, I8MM): under it XNNPACK's result is wrong
# in nearly every element, by qemu 7.2's fault or the kernels'; no board of the profiles has those instructions.
CORES = ("cortex-a76", "cortex-a72")
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="a bundle with an artifact for --target (default: the demo's network, trained and compiled now)")
    parser.add_argument("--target", default="rpi5")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "arm64", help="where the arm64 system is kept between runs")
    parser.add_argument("--transcript", type=Path, help="write what was run and what came out here, as Markdown")
    given = parser.parse_args()
    for program in ("qemu-aarch64-static", "debootstrap", "dpkg-deb"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not here: apt install qemu-user-static debootstrap")
    given.work.mkdir(parents=True, exist_ok=True)
    system, site = _system(given.work), _site(given.work)
    bundle = given.bundle or _demo(given.work)
    lines: list[str] = []
    _run(
        CORES[0],
        system,
        site,
        lines,
        "-c",
        "import platform, numpy; print(platform.machine(), 'Python', platform.python_version(), 'numpy', numpy.__version__)",
    )
    equal = [_equal(core, system, site, lines, bundle, given.target) for core in CORES]
    lines.append("every output equals the host's" if all(equal) else "OUTPUTS DIFFER")
    print(lines[-1])
    if given.transcript:
        given.transcript.write_text(_markdown(lines), encoding="utf-8")
    return 0 if all(equal) else 1


def _equal(core: str, system: Path, site: Path, lines: list[str], bundle: Path, target: str) -> bool:
    """Whether the device's own command finds every element equal to the host's."""
    printed = _run(core, system, site, lines, "-m", "isthmus.runtimes", "verify", str(bundle), "-t", target)
    rows = json.loads(printed.splitlines()[-1])["verification"]
    for row in rows:
        same = row["compared"] - row["mismatched"]
        lines.append(f"{row['tensor']}: {same:,} of {row['compared']:,} elements equal the host's, largest difference {row['max_lsb']} LSB")
        print(lines[-1], flush=True)
    return bool(rows) and all(row["passed"] and row["mismatched"] == 0 and row["compared"] > 0 for row in rows)


def _system(work: Path) -> Path:
    """A minimal arm64 Debian, unpacked. Marked when it is whole: a cut download starts again."""
    place, whole = work / "debian", work / "debian.whole"
    if whole.is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    print("fetching a minimal arm64 Debian (a minute, once)", flush=True)
    argv = ["debootstrap", "--foreign", "--variant=minbase", "--arch=arm64", f"--include={PACKAGES}", SUITE, str(place), MIRROR]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    for package in sorted(place.glob("var/cache/apt/archives/*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(place)], check=True)
    whole.write_text(f"{SUITE}\n")
    return place


def _site(work: Path) -> Path:
    """What a device installs: numpy, LiteRT and the runtime wheel. Made anew each time: the runtime is what is tested."""
    wheels, site = work / "wheels", work / "site"
    shutil.rmtree(site, ignore_errors=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    argv = [sys.executable, "-m", "pip", "download", "-q", *platforms, "--python-version", "311", "--only-binary=:all:", "--no-deps"]
    shutil.rmtree(wheels, ignore_errors=True)
    subprocess.run([*argv, "-d", str(wheels), *WHEELS], check=True)
    (wheels / "isthmus-0-py3-none-any.whl").write_bytes(runtime_wheel())
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return site


def _demo(work: Path) -> Path:
    """The demo's network for a Raspberry Pi, on this host."""
    import isthmus

    return isthmus.compile("zoo:digits", targets=["rpi5"], recipe="portable-qat", output=work / "bundle", force=True).root


def _run(core: str, system: Path, site: Path, lines: list[str], *arguments: str) -> str:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "HOME": str(system / "root"), "PYTHONDONTWRITEBYTECODE": "1"}
    begun = time.perf_counter()
    argv = ["qemu-aarch64-static", "-cpu", core, "-L", str(system), str(system / "usr/bin/python3"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    shown = " ".join(f"'{word}'" if " " in word else Path(word).name if "/" in word else word for word in arguments)
    lines.append(f"{core}$ python3 {shown}    # {time.perf_counter() - begun:.0f} s, emulated")
    if done.returncode < 0 or not done.stdout.strip():
        raise SystemExit(f"{lines[-1]}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    if arguments[0] == "-c":
        lines.append(done.stdout.strip())
    print(lines[-1], flush=True)
    return done.stdout


def _markdown(lines: list[str]) -> str:
    machine = subprocess.run(["qemu-aarch64-static", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    text = "\n".join(lines)
    return f"""# The device package on 64-bit ARM, emulated

`make test-arm64` unpacks a minimal arm64 Debian {SUITE}, puts numpy, LiteRT (their aarch64 wheels: {", ".join(WHEELS)}) and the runtime wheel beside it,
and runs the
demo's bundle under {machine.split(" (")[0]}, as the cores of a Raspberry Pi 5 and 4. The integers that those instruction
sets compute are compared with the host's; emulated time says nothing about a board and is not quoted anywhere.

Known: LiteRT 2.2.0 and 2.3.0 crash under this emulator when an interpreter is made; and qemu's own processor model `max` (SVE2, I8MM), which no
board of the profiles has, gives wrong results in nearly every element. Whether the emulator or the kernels are at fault is not known.

```
{text}
```
"""


if __name__ == "__main__":
    sys.exit(main())
