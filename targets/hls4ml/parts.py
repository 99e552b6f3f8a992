# SPDX-License-Identifier: Apache-2.0
"""The FPGA part a project is written for: the board's own, or the same device in another package or speed grade (`--set part=`)."""

from __future__ import annotations

import difflib
import re

from isthmus.errors import IsthmusError
from isthmus.profile import Profile, load_profile, profile_names

# Device, package, speed grade: 7 series (xc7z020clg400-1), UltraScale+ (xczu9eg-ffvb1156-2-e), Arria 10 (10AX115N2F45E1SG), PolarFire (MPF300T-FCG1152I).
FAMILIES = (
    r"(xc7[a-z]+\d+t?)[a-z]{2,4}\d+-\d+l?[a-z]?",
    r"(xc(?:zu|ku|vu|k|u)\d+[a-z]*)-[a-z]{4}\d+-\d+[a-z]*(?:-[a-z])?",
    r"(10a[xst]\d{3})[a-z]\d[a-z]\d{2}[a-z0-9]+",
    r"(mpf\d{3}t?[a-z]?)-\d?[a-z]+\d+[a-z]?",
)


def device_of(part: str) -> str:
    """ "xc7z020" of "xc7z020clg400-1"; "" where the name is of no known form."""
    found = (re.fullmatch(pattern, part.lower()) for pattern in FAMILIES)
    return next((match.group(1) for match in found if match is not None), "")


def checked_part(profile: Profile, wanted: str) -> str:
    """The part to write for. Raises `IsthmusError` where `wanted` is no part, or another device than the profile's, whose figures would not hold."""
    own = profile.toolchain.get("part")
    if not isinstance(own, str):
        raise IsthmusError(f"profile {profile.name}: target hls4ml needs toolchain.part (a part name) and facts.dsp (a number)")
    device = device_of(own)
    if wanted in ("", own) or device_of(wanted) == device != "":
        return wanted or own
    start = f"option part of target hls4ml: {wanted!r}"
    boards = {str(load_profile(name).toolchain.get("part", "")): name for name in profile_names()}
    if wanted in boards:
        raise IsthmusError(f"{start} is the part of board {boards[wanted]}: use --target {boards[wanted]}")
    if device and wanted.lower().startswith(device):
        raise IsthmusError(f"{start} is no part of {device.upper()}: expected the device, a package and a speed grade, as in {own}")
    near = difflib.get_close_matches(wanted, [part for part in boards if part], n=3, cutoff=0.6) or [own]
    raise IsthmusError(f"{start} is another device than {profile.board}'s: did you mean {' or '.join(near)} ('isthmus targets' lists the boards)?")
