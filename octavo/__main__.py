"""Where the process of a command starts: `octavo`, and `python -m octavo`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Runs the command line. Until its modules are imported, Ctrl-C ends the process at once and without a word, with 130.

    An exception would be printed with its traceback where it meets the imports, and extension modules make others of it.
    """
    catches = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a job in the background ignores Ctrl-C
    if catches:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from octavo.cli import main

    return main(imported=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) if catches else None)


if __name__ == "__main__":
    sys.exit(main())
