"""`srde-ds build_dataset`, for launchers that want a script."""

import sys

from srde_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["build_dataset", *sys.argv[1:]]))
