"""`srde-ds train`, for launchers that want a script."""

import signal
import sys

if __name__ == "__main__":
    at_ctrl_c = signal.getsignal(signal.SIGINT)
    if at_ctrl_c is signal.default_int_handler:  # while this loads, no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from srde_ds.cli.main import main

    signal.signal(signal.SIGINT, at_ctrl_c)
    sys.exit(main(["train", *sys.argv[1:]]))
