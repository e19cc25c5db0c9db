"""`exit_code_of`: what Python makes of a program that ends, for processes that fork programs."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code_of(program: Callable[[], object]) -> int:
    """Run it; what it raises is reported as at the end of a process."""
    try:
        program()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
