# SPDX-License-Identifier: Apache-2.0
"""`python -m isthmus.targets.trees.compile_simulation`, in the artifact's folder: csim/bridge.cpp -> csim/libtrees.so, by g++."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from isthmus.targets.trees import simulation
from isthmus.tools import find_tool

# conifer's wheel leaves out two sets of headers that its repository has: (module that brings them, folder inside it).
HEADERS = (("conifer", "backends/cpp/include"), ("nlohmann_json", "include"), ("hls4ml", "templates/vivado/ap_types"))


def main() -> int:
    return compiled(simulation.SOURCE_FILE, simulation.LIBRARY_FILE, simulation.FLAGS)


def compiled(source: str, library: str, flags: Sequence[str]) -> int:
    """g++ with conifer's, JSON's and AMD's headers; its exit code, 1 where it or a header is missing."""
    compiler = find_tool("g++")
    if not compiler.found:
        sys.stdout.write(f"g++ is not here: {compiler.fix}\n")
        return 1
    folders = []
    for module, folder in HEADERS:
        spec = importlib.util.find_spec(module)
        place = Path(spec.origin).parent / folder if spec is not None and spec.origin else _namespace(module, folder)
        if place is None or not place.is_dir():
            sys.stdout.write(f"{module} is not here, whose headers conifer's C++ needs: pip install 'isthmus[trees]'\n")
            return 1
        folders.append(f"-I{place}")
    argv = [compiler.path, *flags, *folders, source, "-o", library]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=sys.stdout.fileno(), stderr=subprocess.STDOUT, check=False).returncode


def _namespace(module: str, folder: str) -> Path | None:
    """The folder inside a package without an __init__.py."""
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) / folder if places else None


if __name__ == "__main__":
    sys.exit(main())
