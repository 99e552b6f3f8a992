# SPDX-License-Identifier: Apache-2.0
"""Where in a user's own code something went wrong inside torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def user_line(error: BaseException, ours: Collection[str]) -> str:
    """' (model.py:12)': the innermost frame of the error or of its causes that is neither torch's nor in a file of `ours`; '' where there is none."""
    found = ""
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            if "torch" not in Path(file).parts and file not in ours and not file.startswith("<"):
                found = f" ({Path(file).name}:{trace.tb_lineno})"
            trace = trace.tb_next
        cause = cause.__cause__
    return found
