"""Two processes, of which the last is signalled, write after how many calls each agreed to stop."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from trainlib import runtime  # noqa: E402
from trainlib.runtime.signals import Requests, Signals  # noqa: E402

SIGNALLED_AT = 3


def main(arguments: list[str]) -> None:
    signals = Signals(lambda reason: os._exit(75))
    accelerator = runtime.make_accelerator(False, 1)
    signals.hold()
    by_message = Requests(accelerator, signals, None)
    by_sums = Requests(accelerator, signals, 0.0)
    seen = []
    for step in range(6):
        if step == SIGNALLED_AT and accelerator.process_index == accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        flags = torch.zeros(Requests.NUM)
        by_sums.add_to(flags)
        torch.distributed.all_reduce(flags)
        by_sums.take(flags.tolist())
        seen.append({"agreed": by_message.agree(), "stop": by_sums.stop, "save": by_sums.save,
                     "received": signals.received})
        if step == 1:
            by_sums.saved()
    Path(arguments[0], f"{accelerator.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    runtime.run(main)
