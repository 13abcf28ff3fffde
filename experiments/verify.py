"""Check a compressed network that someone sends: accuracy, counts and bytes, without training.

    python -m experiments.verify debug_output/compressed.codeq --data-dir data
    python -m experiments.verify debug_output/slim.pt2 --json
    python -m experiments.verify vgg.codeq --model torchvision.models:vgg11_bn

A packed file (.codeq) holds no code and is safe to open whoever sends it; of a network that is not one of
resnet.py it holds the numbers, and --model brings the code. A .pt2 file is torch's own format, in which there
can be code; one in which anything but tensors and operations on them is found is refused before it is loaded.

The last line is VERIFIED, NOT VERIFIED (what the file says of itself is not so), or NOT CHECKED (why: it says
nothing, or what cannot be measured of it, or the data set that it was tested on is not here).
Exit status: 0, 1 and 3 for these, 2 for bad input or where standard output cannot be written; 130 after
Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # python experiments/verify.py, without -m
    sys.path[0] = str(Path(__file__).parents[1])

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` handles signals, Ctrl-C ends the program silently: a traceback out of `import torch` helps
    # nobody.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from dataclasses import asdict

from experiments.cifar import DataError, NoCifarError
from experiments.data import Dataset, data_of, load_dataset
from experiments.exit_status import EXIT_FAILED, EXIT_OK, ExitStatus
from experiments.files import as_json
from experiments.live import LiveLine
from experiments.received import NOT_CHECKED, NOT_VERIFIED, VERIFIED, check_file
from experiments.settings import DATA, Parser, folder_path, whole_number

EXIT_NOT_CHECKED = 3
STATUS = {VERIFIED: EXIT_OK, NOT_VERIFIED: EXIT_FAILED, NOT_CHECKED: EXIT_NOT_CHECKED}


def main(arguments: list[str] | None = None) -> int:
    live = LiveLine()
    parser = Parser(
        prog="python -m experiments.verify",
        description="Check a compressed network that someone sends, without training.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="compressed.codeq or slim.pt2")
    parser.add_argument("--data", choices=DATA, default="auto", help="auto: the set that the file says")
    parser.add_argument(
        "--data-dir",
        type=folder_path,
        default=Path("data"),
        help="folder of cifar-10-batches-py or cifar-100-python",
    )
    parser.add_argument("--limit-test", type=whole_number, help="use only the first so many test images")
    parser.add_argument(
        "--model", default="", metavar="NAME", help="module:callable that builds a network not of resnet.py"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the lines")
    chosen = parser.parse_args(arguments)
    say = (lambda text: None) if chosen.json else live.say
    with ExitStatus(live, "the same command starts over") as end:

        def load(named: str) -> Dataset:
            auto = chosen.data == "auto"
            data = data_of(named) if auto else chosen.data
            try:
                return load_dataset(data, chosen.data_dir, None, chosen.limit_test, say)
            except DataError as error:
                if not (auto and isinstance(error.__cause__, NoCifarError)):
                    raise
                say(str(error))
                return load_dataset("synthetic", chosen.data_dir, None, None, say)

        received = check_file(chosen.file, load, say, chosen.model)
        if chosen.json:
            words = {"result": received.result, "false": received.false}
            live.say(as_json({"file": str(chosen.file), **words, **asdict(received)}))
        end.status = STATUS[received.result]
    return end.status


if __name__ == "__main__":
    sys.exit(main())
