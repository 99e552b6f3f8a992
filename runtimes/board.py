# SPDX-License-Identifier: Apache-2.0
"""Runs on the board, by the board's own Python (3.8 or newer), before isthmus is there: `isthmus.runtimes.remote` sends this file's text.

    python3 - look ROOT SHA256 SIZE ...      what has arrived of each file, and what this board is
    python3 - unpack ROOT SHA256             checks an archive that has arrived and unpacks it into ROOT/bundle-...
    python3 - wheel ROOT SHA256 NAME         checks a wheel that has arrived and gives it its name
    python3 - environment ROOT WHEEL MODULE DISTRIBUTION     makes ROOT/env-..., with the wheel, numpy and the engine

ROOT is a folder in the home of whoever is logged in.

Standard library only. Each prints one line of JSON; a mistake is {"error": sentence}.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile

OLDEST = (3, 10)  # what the wheel itself needs
LAST_LINES = 6
MOST_BUNDLES = 8
THERE = -1


class Failure(Exception):
    """One sentence for the person at the host."""


def partial(root: str, digest: str) -> str:
    return os.path.join(root, "incoming", digest)


def final(root: str, digest: str) -> str:
    return os.path.join(root, "bundle-" + digest[:32])


def wheel_folder(root: str, digest: str) -> str:
    return os.path.join(root, "wheel-" + digest[:32])


def look(root: str, *pairs: str) -> dict:
    os.makedirs(os.path.join(root, "incoming"), mode=0o700, exist_ok=True)
    have = {}
    for digest, size in zip(pairs[::2], pairs[1::2]):
        if os.path.isdir(final(root, digest)) or os.path.isdir(wheel_folder(root, digest)):
            have[digest] = THERE
            continue
        file = partial(root, digest)
        there = os.path.getsize(file) if os.path.isfile(file) else 0
        if there > int(size) or (there == int(size) and sha256(file) != digest):
            os.remove(file)  # not what was sent: begin again
            there = 0
        have[digest] = there
    free = shutil.disk_usage(root).free
    return {"have": have, "free_bytes": free, "machine": platform.machine(), "python": platform.python_version(), "enough": sys.version_info >= OLDEST}


def checked(root: str, digest: str) -> str:
    file = partial(root, digest)
    if sha256(file) != digest:
        os.remove(file)
        raise Failure("a file arrived damaged and was removed; start again")
    return file


def unpack(root: str, digest: str) -> dict:
    place = final(root, digest)
    if os.path.isdir(place):
        os.utime(place)
        return {"folder": place}
    file = checked(root, digest)
    making = place + ".partial-" + str(os.getpid())
    with tarfile.open(file) as archive:
        for member in archive.getmembers():
            target = os.path.normpath(os.path.join(making, member.name))
            if not member.isfile() or not target.startswith(making + os.sep):
                raise Failure("the archive holds {!r}, which is no file inside it".format(member.name))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            source = archive.extractfile(member)
            with open(target, "wb") as out:
                shutil.copyfileobj(source, out)  # type: ignore[arg-type]  # a regular file's is never None
    os.rename(making, place)
    os.remove(file)
    older = sorted((name for name in os.listdir(root) if name.startswith("bundle-")), key=lambda name: os.path.getmtime(os.path.join(root, name)))
    for name in older[:-MOST_BUNDLES]:
        shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    return {"folder": place}


def wheel(root: str, digest: str, name: str) -> dict:
    folder = wheel_folder(root, digest)
    place = os.path.join(folder, os.path.basename(name))
    if not os.path.isfile(place):
        file = checked(root, digest)
        os.makedirs(folder, exist_ok=True)
        os.rename(file, place)
    return {"file": place}


def environment(root: str, wheel_file: str, module: str, distribution: str) -> dict:
    """One environment a wheel and engine. System packages are seen: a Jetson's tensorrt comes with the system."""
    name = os.path.basename(wheel_file)
    place = os.path.join(root, "env-" + hashlib.sha256((name + "\n" + distribution + "\n" + sys.version + "\n" + sha256(wheel_file)).encode()).hexdigest()[:16])
    python = os.path.join(place, "bin", "python")
    done = os.path.join(place, "complete")
    if not os.path.isfile(done):
        shutil.rmtree(place, ignore_errors=True)
        run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", place], "cannot make an environment (Debian: apt install python3-venv)")
        missing = [wanted for needed, wanted in (("numpy", "numpy"), (module, distribution)) if wanted and not imports(python, needed)]
        if missing:  # pip takes seconds to arrive: only where it has work
            run([python, "-m", "ensurepip"], "cannot bring pip (Debian: apt install python3-venv)")
            run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", *missing], "cannot install " + " and ".join(missing))
        site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).decode().strip()
        with zipfile.ZipFile(wheel_file) as archive:  # pure Python, made by the host: to unpack it is to install it
            archive.extractall(site)
        with open(done, "w") as stream:
            stream.write(name + "\n")
    return {"python": python}


def imports(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", "import " + module], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def run(argv: list, what: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        raise Failure("{}: {}".format(what, " | ".join(lines)))


def sha256(file: str) -> str:
    total = hashlib.sha256()
    with open(file, "rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            total.update(block)
    return total.hexdigest()


COMMANDS: dict = {"look": look, "unpack": unpack, "wheel": wheel, "environment": environment}


def main(arguments: list) -> None:
    try:
        if not arguments or arguments[0] not in COMMANDS:
            raise Failure("one of " + ", ".join(COMMANDS))
        root = os.path.join(os.path.expanduser("~"), arguments[1])
        command = COMMANDS[arguments[0]]
        print(json.dumps(command(root, *arguments[2:])))
    except Failure as error:
        print(json.dumps({"error": str(error)}))
    except OSError as error:
        print(json.dumps({"error": "{}: {}".format(error.filename or "the board", error.strerror or error)}))


if __name__ == "__main__":
    main(sys.argv[1:])
