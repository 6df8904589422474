"""``python -m vidkern`` is the ``vidkern`` command."""

import sys

from vidkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
