"""`srde-ds chat`, for launchers that want a script."""

import sys

from srde_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
