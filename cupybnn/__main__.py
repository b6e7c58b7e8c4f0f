"""``python -m cupybnn``: the same as the command ``cupybnn``."""

import sys

from cupybnn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
