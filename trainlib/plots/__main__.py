"""Draw a run again, or several over each other.

    python -m trainlib.plots runs/digits_mlp              # curves.png and the rest, in its folder
    python -m trainlib.plots runs/a runs/b --out both.png # their curves, and what differs
"""

import argparse
import sys
from pathlib import Path

from trainlib.plots import NotARun, draw_run, overlay
from trainlib.plots.paper import CannotWrite

_OUT = Path("comparison.png")


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 if a folder is no run, or nothing can be written where it should."""
    parser = argparse.ArgumentParser(
        "python -m trainlib.plots", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help=f"the PNG that several runs are drawn to (default: {_OUT})")
    options = parser.parse_args(arguments)
    if options.out is not None and len(options.runs) == 1:
        return _refuse("--out is where several runs are drawn to, got one run, whose pictures go "
                       "into its folder; leave --out away, or give another run")
    if options.out is not None and options.out.suffix.lower() != ".png":
        return _refuse(f"--out is a PNG, got {options.out}; let its name end with .png")
    try:
        if len(options.runs) == 1:
            written = draw_run(options.runs[0], _say)
        else:
            written = [options.out or _OUT]
            overlay(options.runs, written[0])
    except NotARun as error:
        return _refuse(str(error))
    except CannotWrite as error:
        way_out = "make room" if len(options.runs) == 1 else "choose another --out, or make room"
        return _refuse(f"{error.filename}: cannot be written ({error.strerror}); {way_out}")
    for file in written:
        print(file)
    return 0


def _refuse(line: str) -> int:
    _say(line)
    return 2


def _say(line: str) -> None:
    print(f"plots: {line}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
