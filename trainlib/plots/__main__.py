"""Draw a run again, or several over each other.

    python -m trainlib.plots runs/digits_mlp              # curves.png and the rest, in its folder
    python -m trainlib.plots runs/a runs/b --out both.png # their curves, and what differs
"""

import argparse
import sys
from pathlib import Path

from trainlib.plots import NotARun, draw_run, overlay


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 if a folder is no run."""
    parser = argparse.ArgumentParser(
        "python -m trainlib.plots", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), metavar="FILE",
                        help="where several runs are drawn to (default: comparison.png)")
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) == 1:
            written = draw_run(options.runs[0])
        else:
            overlay(options.runs, options.out)
            written = [options.out]
    except NotARun as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plots: {error.filename}: cannot be written ({error.strerror}); choose another "
              "--out, or make room", file=sys.stderr)
        return 2
    for file in written:
        print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
