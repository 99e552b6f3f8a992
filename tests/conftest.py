# SPDX-License-Identifier: Apache-2.0
"""What every test shares: tools that must not be missing where they are promised, seeds, repeatable property tests."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable

# Two pytest-xdist workers on two cores: torch and OpenMP would start two threads each. Set before anything imports them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

from isthmus.tools import find_tool, tool_names

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

# Tools of the tests alone; the program's own are in `isthmus.tools`.
TEST_PROGRAMS = {"chromium": "apt install chromium", "make": "apt install make", "sshd": "apt install openssh-server"}


def promised() -> set[str]:
    """The tools that ISTHMUS_REQUIRE names (comma-separated): missing ones fail a test instead of skipping it."""
    return {name.strip() for name in os.environ.get("ISTHMUS_REQUIRE", "").split(",") if name.strip()}


def pytest_configure(config: pytest.Config) -> None:
    unknown = promised() - set(tool_names()) - set(TEST_PROGRAMS)
    if unknown:
        raise pytest.UsageError(f"ISTHMUS_REQUIRE names {sorted(unknown)}; known tools are {sorted({*tool_names(), *TEST_PROGRAMS})}")


def _look_up(name: str) -> tuple[str, str]:
    """Path of the tool ("" where it is missing), and the command that brings it."""
    if name in TEST_PROGRAMS:
        return shutil.which(name) or shutil.which(name, path="/usr/sbin") or "", TEST_PROGRAMS[name]  # sbin is on no user's PATH
    tool = find_tool(name)
    return (tool.path or tool.name) if tool.found else "", tool.fix


@pytest.fixture(scope="session")
def require() -> Callable[[str], str]:
    """`require("g++")` gives the tool's path. A missing tool skips the test with its reason, or fails it where ISTHMUS_REQUIRE names it."""

    def path_of(name: str) -> str:
        path, fix = _look_up(name)
        if not path and name in promised():
            pytest.fail(f"ISTHMUS_REQUIRE promises {name}, which is not here: {fix}", pytrace=False)
        if not path:
            pytest.skip(f"{name} is not here: {fix}")
        return path

    return path_of


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it on the same worker."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
