"""`python -m dist_moe` is `dist-moe`."""

import sys

from dist_moe.cli.start import main

if __name__ == "__main__":
    sys.exit(main())
