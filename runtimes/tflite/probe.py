# SPDX-License-Identifier: Apache-2.0
"""Opens and runs a `.tflite` file of unknown origin in a process of its own: a number in it that an engine cannot live with ends that one, not ours.

`model_file` proves that offsets and indices are sound; a stride of 0 or an absurd extent it does not know, and TFLite divides by it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from isthmus.errors import IsthmusError

TIME_LIMIT_S = 120.0
MODULE = "isthmus.runtimes.tflite.probe"


def probe(path: Path, xnnpack: bool = True, time_limit_s: float = TIME_LIMIT_S) -> None:
    """Raises `IsthmusError`, one sentence, where one run on zeros ends the engine, fails, or takes longer than `time_limit_s`."""
    argv = [sys.executable, "-m", MODULE, str(path), "xnnpack" if xnnpack else "builtin"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=time_limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise IsthmusError(f"{path}: one run takes more than {time_limit_s:g} s; give a smaller model, or a whole file") from None
    if done.returncode < 0:
        raise IsthmusError(f"{path}: running it ends the engine ({signal.Signals(-done.returncode).name}); the file is broken")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise IsthmusError(lines[-1] if lines else f"{path}: the engine cannot run it (exit code {done.returncode})")


def main(path: str, resolver: str) -> int:
    from isthmus.runtimes.tflite import TfliteSession

    try:
        with TfliteSession(Path(path), xnnpack=resolver == "xnnpack") as session:
            session.run_raw({spec.name: np.zeros(spec.shape, spec.dtype) for spec in session.inputs})
    except IsthmusError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"{path}: the engine cannot run it ({reason.rstrip('.')})\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
