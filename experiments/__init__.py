"""The debug run and the programs beside it."""

import signal
import sys

# While `python -m experiments...` loads its packages, Ctrl-C just ends it, without a traceback.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
