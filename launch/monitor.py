"""`srde-ds monitor`, for those who want a script."""

import sys

from srde_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["monitor", *sys.argv[1:]]))
