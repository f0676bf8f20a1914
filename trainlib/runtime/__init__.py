"""Accelerator set-up and refusals, the run folder, exit codes.

What can go wrong before a run starts is refused here in one line each, because Accelerate lets
each of these pass in silence and trains something else than was asked for.
"""

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs

from trainlib.config import UserError, flatten, is_first_process, parse_yaml

# Options that may differ between two runs of one folder: they change no weight.
_FREE_OPTIONS = ("run_dir", "log.", "data.workers", "data.in_memory")


def make_accelerator(
    trackers: list[str], deterministic: bool, cpu_threads: int
) -> Accelerator:
    """The Accelerator, after the refusals.

    Args:
        trackers: Accelerate's names of them.
        deterministic: only algorithms that give the same bits each time; on a GPU slower.
        cpu_threads: of this process, whatever the launcher set.

    Raises:
        UserError: a launch that Accelerate would carry out as something else.
    """
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accumulation}, which would divide every "
            "gradient again: unset it (or gradient_accumulation_steps in the accelerate config); "
            "accumulation follows from batch.global_size and batch.micro_size"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "DeepSpeed divides and accumulates gradients its own way, so the curve would change: "
            "use a config without it, such as accelerate_configs/multi_gpu.yaml; sharding will be "
            "FSDP2's part"
        )
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"{variable} is set, but sharded models are not supported yet: every process "
                "holds the whole model; use accelerate_configs/multi_gpu.yaml"
            )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=1,
            log_with=trackers or None,
            # Buffers are the same everywhere by construction; broadcasting would cost a message.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:  # such as fp8 without its packages, bf16 without support
        raise UserError(f"Accelerate refuses this launch: {error}") from error
    torch.set_num_threads(cpu_threads)  # after Accelerate, which sets a number of its own
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}, so "
            "they would train separately and overwrite each other: this machine has no GPU for "
            "that config; for several CPU processes set ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision.lower() == "fp16" and accelerator.scaler is None:
        raise UserError(
            f"mixed_precision fp16 needs a GPU; on {accelerator.device.type} Accelerate would "
            "train in fp32 without a word: set mixed_precision to bf16 or 'no'"
        )
    return accelerator


def make_seeder(device: torch.device) -> Callable[[int], object]:
    """A function that seeds the generators a forward draws from.

    It seeds the device's own generator and the CPU's; ``torch.manual_seed`` seeds every device
    there is and costs 50 times as much.
    """
    if device.type == "cuda":
        generators = [torch.cuda.default_generators[device.index or 0], torch.default_generator]
        return lambda seed: [generator.manual_seed(seed) for generator in generators]
    if device.type == "cpu":
        return torch.default_generator.manual_seed
    return torch.manual_seed


class RunFolder:
    """The folder of one run, opened by all processes and written by the main one."""

    current: "RunFolder | None" = None

    def __init__(self, path: Path, accelerator: Accelerator, config: str):
        """Opens the folder for the run that ``config`` (YAML) describes.

        Raises:
            UserError: the folder holds another recipe's run, or is not a run folder.
            SystemExit: this very run has finished there; exit code 0.
        """
        self.path, self.is_main = path, accelerator.is_main_process
        self.step = 0
        self.at_exit: Callable[[], None] = lambda: None
        self._check(config)
        accelerator.wait_for_everyone()  # nobody looks at the folder any more
        if self.is_main:
            try:
                self._write_start(config, accelerator)
            except OSError as error:
                raise UserError(
                    f"run_dir: {path} cannot be written ({error.strerror}); choose another "
                    "--run_dir"
                ) from error
        RunFolder.current = self

    def _write_start(self, config: str, accelerator: Accelerator) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("exit.json", "bad_steps.jsonl", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        (self.path / "config.yaml").write_text(config, encoding="utf-8")
        (self.path / "environment.json").write_text(
            json.dumps(_environment(accelerator), indent=1) + "\n", encoding="utf-8"
        )

    def _check(self, config: str) -> None:
        try:
            exists = self.path.exists()
        except OSError as error:
            raise UserError(f"run_dir: {self.path}: {error.strerror}") from error
        if not exists:
            return
        if not self.path.is_dir():
            raise UserError(f"run_dir: {self.path} is a file; choose another --run_dir")
        if not any(self.path.iterdir()):
            return
        try:
            found = flatten(parse_yaml((self.path / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
            raise UserError(f"run_dir: {self.path} holds files but no run (config.yaml); choose "
                            "another --run_dir") from error
        wanted = flatten(parse_yaml(config))
        changed = [
            f"{name} ({found.get(name, 'unset')} there, {wanted.get(name, 'unset')} here)"
            for name in sorted(found | wanted)
            if found.get(name) != wanted.get(name) and not name.startswith(_FREE_OPTIONS)
        ]
        if changed:
            raise UserError(
                f"run_dir: {self.path} holds the run of another recipe: {', '.join(changed)}; "
                "choose another --run_dir, or remove that folder"
            )
        try:
            record = json.loads((self.path / "exit.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return  # it was cut off: the same recipe starts again here
        if record.get("code") == 0:
            if self.is_main:
                print(f"{self.path}: this run has finished ({record['reason']}). For another, "
                      "change an option and choose another --run_dir, or remove that folder.")
            raise SystemExit(0)

    def record_exit(self, code: int, reason: str) -> None:
        """Writes ``exit.json``, since launchers replace a script's own exit code by 1.

        A mistake that one process alone has met, such as a broken image, is written by that one;
        the others, which miss it in their communication, do not write over it.
        """
        file = self.path / "exit.json"
        if (self.is_main or code == UserError.exit_code) and not file.exists():
            entry = {"code": code, "reason": reason, "step": self.step}
            file.write_text(json.dumps(entry) + "\n", encoding="utf-8")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's ``main`` on the command line and ends the process with the right code.

    A mistake of the user, or a diverged run, ends in one line without a traceback.
    """
    try:
        main(sys.argv[1:])
        code, reason = 0, "finished"
    except SystemExit as exit_request:
        code, reason = int(exit_request.code or 0), None
    except Exception as error:
        code, reason = getattr(error, "exit_code", 1), str(error)
        if code == 1:
            traceback.print_exc()
        elif is_first_process() or (code == UserError.exit_code and RunFolder.current):
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        else:
            time.sleep(3)  # the launcher ends all when one ends: the first has yet to speak
    folder = RunFolder.current
    if folder is not None and reason is not None:
        folder.at_exit()
        try:
            folder.record_exit(code, reason)
        except OSError as error:
            print(f"exit.json cannot be written: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        if code == 0:
            torch.distributed.barrier()
        # gloo's threads abort the interpreter's shutdown now and then, long after the work is
        # done (measured: 2 of 15 exits). Everything is written; leave without that shutdown.
        os._exit(code)
    sys.exit(code)


def _environment(accelerator: Accelerator) -> dict:
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    device = accelerator.device
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
