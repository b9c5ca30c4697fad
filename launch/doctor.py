"""`srde-ds doctor`, for those who want a script."""

import sys

from srde_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
