"""Check a compressed network that someone sends: accuracy, counts and bytes, without training.

    python -m experiments.verify debug_output/compressed.codeq --data-dir data
    python -m experiments.verify debug_output/slim.pt2 --data synthetic

A packed file (.codeq) holds no code and is safe to open whoever sends it. A .pt2 file is torch's own format,
which is not meant for files from strangers: open those of people you trust.
Exit status: 0, 1 when a packed file's own claims do not hold, 2 for bad input.
"""

import sys
from pathlib import Path

from experiments.data import load_dataset
from experiments.exit_status import EXIT_FAILED, EXIT_OK, ExitStatus
from experiments.live import LiveLine
from experiments.received import check_file
from experiments.settings import DATA, Parser


def main(arguments: list[str] | None = None) -> int:
    live = LiveLine()
    parser = Parser(
        prog="python -m experiments.verify", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="compressed.codeq or slim.pt2")
    parser.add_argument("--data", choices=DATA, default="auto", help="as for experiments.debug_run")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of cifar-10-batches-py")
    parser.add_argument("--limit-test", type=int, help="use only the first so many test images")
    chosen = parser.parse_args(arguments)
    with ExitStatus(live, "the same command starts over") as end:
        received = check_file(
            chosen.file,
            lambda: load_dataset(chosen.data, chosen.data_dir, None, chosen.limit_test, live.say),
            live.say,
        )
        end.status = EXIT_OK if received.holds else EXIT_FAILED
    return end.status


if __name__ == "__main__":
    sys.exit(main())
