"""`python -m jointnas`: the command line, as `torchrun -m jointnas` starts it."""

import sys

from jointnas.cli import main

if __name__ == "__main__":
    sys.exit(main())
