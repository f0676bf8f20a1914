"""Evaluates one fixed net on the first 1, 5, 97 and 360 samples; writes all results as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from trainlib import data, models, runtime, tasks  # noqa: E402
from trainlib.evaluate import evaluate  # noqa: E402


def main(arguments: list[str]) -> None:
    accelerator = runtime.make_accelerator(False, 1)
    options = data.DataOptions()
    task_options = tasks.resolve({}, ["digit"], ["digit"])
    digits = data.load(data.open_source(options), options, task_options)
    task_list = tasks.build_tasks(task_options, digits.targets)
    torch.manual_seed(0)
    model = models.build_model(models.complete(models.ModelOptions(), (1, 8, 8), 10))
    results = []
    for size in (1, 5, 97, 360):
        split = data.Split(
            digits.validation.inputs[:size],
            {"digit": digits.validation.targets["digit"][:size]}, digits.validation.rows[:size],
        )
        by_batch_size = {}
        for batch_size in (7, 32, 400):
            reader = data.EvalReader(
                split, batch_size, accelerator.process_index, accelerator.num_processes,
                accelerator.device,
            )
            by_batch_size[batch_size] = evaluate(model, reader, task_list, accelerator)
        results.append({"size": size, "results": by_batch_size})
    if accelerator.is_main_process:
        Path(arguments[0]).write_text(json.dumps(results))


if __name__ == "__main__":
    runtime.run(main)
