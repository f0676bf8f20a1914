"""A script with trackers that are not there, or that fail.

    TRACKERS="wandb log, trackio finish" python tests/fake_trackers.py --run_dir ...

Each word pair has a stand-in for a tracker of Accelerate fail at that point (``start``, ``log``,
``finish``), or ``hang`` there as in "wandb hang finish"; else it writes what it is given to
RUN_DIR.TRACKER.jsonl.
"""

import json
import os
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate.tracking  # noqa: E402

import train  # noqa: E402
from trainlib import runtime  # noqa: E402
from trainlib.trackers import mirror  # noqa: E402


class StandIn(accelerate.tracking.GeneralTracker):
    requires_logging_directory = False
    failing: list[str] = []
    resumed, offline, summary = False, True, {}

    def __init__(self, run_name, *_, **settings):
        super().__init__()
        self.settings = settings

    @property
    def tracker(self):
        return self

    def start(self):
        folder = sys.argv[sys.argv.index("--run_dir") + 1]
        self.file = Path(f"{folder}.{self.name}.jsonl")
        self.write("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        self.write("log", values={k: str(v) for k, v in values.items()}, at=step)

    def finish(self, exit_code=None):
        self.write("finish", exit_code=exit_code)

    def mark_preempting(self):
        self.write("mark_preempting")

    def define_metric(self, *_, **__):
        pass

    add_scalar = add_image = add_text = define_metric  # tensorboard's

    def write(self, point, **what):
        if point in self.failing:
            if "hang" in self.failing:
                time.sleep(1000)
            raise ConnectionError(f"no such server {point} at http://user:CANARY-url@host")
        with self.file.open("a") as file:
            file.write(json.dumps({"point": point} | what) + "\n")


if __name__ == "__main__":
    mirror._START_SECONDS = mirror._FINISH_SECONDS = 2
    sys.modules.setdefault("trackio", types.SimpleNamespace(Image=str, Table=dict))
    for words in os.environ["TRACKERS"].split(","):
        name, *failing = words.split()
        members = {"name": name, "failing": failing, "summary": {}}
        stand_in = type(name, (StandIn,), members)
        accelerate.tracking.LOGGER_TYPE_TO_CLASS[name] = stand_in
        kind = accelerate.tracking.LoggerType(name)
        if kind not in accelerate.tracking._available_trackers:
            accelerate.tracking._available_trackers.append(kind)
    runtime.run(train.main)
