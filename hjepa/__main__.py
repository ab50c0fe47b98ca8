"""`python -m hjepa`: the same as the command `hjepa`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
