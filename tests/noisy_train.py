"""train.py among libraries that talk: each process warns, logs and prints in two steps.

    [FAIL_RANK=1] python tests/noisy_train.py --run_dir ...

Where FAIL_RANK is this process's rank, it then raises an error. Every text ends with the value of
MY_TOKEN.
"""

import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LIBRARY = logging.getLogger("library")  # with a handler from before the script begins
LIBRARY.addHandler(logging.StreamHandler())
LIBRARY.propagate = False

import train  # noqa: E402
from trainlib import data, runtime  # noqa: E402

RANK, TOKEN = os.environ.get("RANK", "0"), os.environ.get("MY_TOKEN", "")
take = data.Reader.take


def noisy_take(reader: data.Reader, step: int):
    if step in (10, 20):
        warnings.warn(f"one warning {TOKEN}", stacklevel=1)
        warnings.warn(f"two lines\nof step {step} {TOKEN}", stacklevel=1)
        LIBRARY.warning("a record of %s %s", "level warning", TOKEN)
        LIBRARY.error("an error %s", TOKEN)
        logging.getLogger("quiet").warning("a record without a handler %s", TOKEN)
        print("printed", TOKEN)
        print("print", end="")
        print(f"ed in pieces {TOKEN}")
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    if step == 20 and os.environ.get("FAIL_RANK") == RANK:
        raise RuntimeError(f"a fault at http://me:{TOKEN}@host")
    if step == 20 and "FAIL_RANK" in os.environ:
        time.sleep(5)  # until the other's end ends this process, too
    return take(reader, step)


data.Reader.take = noisy_take

if __name__ == "__main__":
    warnings.simplefilter("always")
    runtime.run(train.main)
