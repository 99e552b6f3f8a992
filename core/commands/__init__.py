# SPDX-License-Identifier: Apache-2.0
"""The commands of the command line: each file holds some, `isthmus.cli` lists them all."""
