"""The ``lissom`` command: exit codes and errors. The commands themselves are in ``_commands.py``.

Exit codes: 0 success; 1 something given was wrong or failed (one line on stderr; ``--debug`` shows where);
2 the command line itself was wrong; 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_NEEDS = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: of this process); the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        for name in _NEEDS:
            importlib.import_module(name)
    except ImportError as error:
        return _fail(f"the command line needs {error.name}: pip install 'lissom[cli]'")
    from ._commands import app

    try:
        app(args=given, prog_name="lissom")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if "--debug" in given:
            raise
        return _fail(str(error) or type(error).__name__)
    return 0


def _fail(message: str, code: int = 1) -> int:
    print(f"lissom: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
