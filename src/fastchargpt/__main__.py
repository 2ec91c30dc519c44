"""`python -m fastchargpt`, and so `torchrun -m fastchargpt`."""

import sys

from fastchargpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
