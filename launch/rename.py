"""`srde-ds rename`, for launchers that want a script."""

import sys

from srde_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["rename", *sys.argv[1:]]))
