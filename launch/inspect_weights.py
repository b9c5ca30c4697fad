"""`srde-ds inspect`, for launchers that want a script. A script called inspect.py would hide Python's own module."""

import sys

from srde_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
