"""For every test: the programs that tests start hear SIGTERM, which the workers of pytest-xdist ignore."""

import signal

signal.signal(signal.SIGTERM, signal.SIG_DFL)

# A job that a shell puts in the background ignores Ctrl-C, and so would what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
