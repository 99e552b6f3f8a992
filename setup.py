# SPDX-License-Identifier: Apache-2.0
"""Maps the root folders, one a stage, under the one import package `isthmus` (pyproject.toml cannot say that)."""

from setuptools import find_packages, setup

STAGES = ("train", "quantize", "export", "targets", "runtimes")
mapping = {"isthmus": "core"} | {f"isthmus.{stage}": stage for stage in STAGES}
packages = [package for name, folder in mapping.items() for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))]
setup(packages=packages, package_dir=mapping)
