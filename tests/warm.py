"""Real processes that need not import torch again: forked from one that has done nothing else.

A script spends three of its first four seconds on imports, and the suite starts hundreds. Each
process here runs the script's file from its first line, with an environment and rank of its own.
What is preloaded reads no environment variable that a test sets.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "accelerate", "matplotlib.figure", "pandas", "sklearn.datasets", "sklearn.metrics",
    "torch._dynamo", "torch.onnx",  # by the first optimizer
])


def _run(
    script: str, arguments: list[str], environment: dict[str, str], outputs: list[Path]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    sys.dont_write_bytecode = False  # or each process compiles all of trainlib anew: 0.4 s
    os.chdir(ROOT)
    sys.path[:] = [str((ROOT / script).parent), *sys.path]
    sys.argv = [script, *arguments]
    multiprocessing.set_start_method(None, force=True)  # the default, which data workers rely on
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as request:
        code = request.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # An interpreter's end, which a process of multiprocessing does not come to.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fork(
    arguments: list[str], processes: int = 1, script: str = "train.py",
    terminal: Path | None = None, **environment: str | None,
) -> subprocess.CompletedProcess:
    """Runs a script on so many CPU processes, of whose ranks this process keeps the store.

    Their output is in the result, unless they are given a terminal to write to. A variable given
    as None is unset.
    Where one fails, the others are killed, and its exit code is the result's (negative: a signal).
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for output in outputs:
            output.touch()
        running, code = {}, 0
        for rank in range(processes):
            ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                      "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            variables = {k: str(v) for k, v in ranked.items() if processes > 1}
            variables = dict(os.environ) | variables | environment
            variables = {k: v for k, v in variables.items() if v is not None}
            process = FORKS.Process(target=_run, args=(
                script, arguments, variables, [terminal] * 2 if terminal else outputs
            ))
            process.start()
            running[process.sentinel] = process
        while running:
            ended = wait(list(running), timeout=280)
            for process in running.values() if not ended else ():
                process.kill()  # a deadlock: its exit code says so
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                code = code or process.exitcode
                for other in running.values() if process.exitcode else ():
                    other.kill()
        texts = [output.read_text() for output in outputs]
    return subprocess.CompletedProcess([script, *arguments], code, *texts)
