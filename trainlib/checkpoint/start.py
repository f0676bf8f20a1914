"""Where a run starts: at the newest checkpoint that verifies, or without one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainlib import agreement, durable, shards
from trainlib.checkpoint.layout import EMA, FORMAT, MODEL, OPTIMIZER, STATE, step_folders
from trainlib.checkpoint.state import load_optimizer, model_tensors
from trainlib.config import UserError

if TYPE_CHECKING:
    from trainlib.data import BatchOptions
    from trainlib.ema import Ema

_WAY_OUT = "choose another --run_dir, or bring back the former"


class Start(NamedTuple):
    """Where a run begins: at a verified checkpoint, or without one."""

    path: Path | None
    state: dict[str, Any]
    """Of ``state.json``."""
    notes: list[str]
    """Lines for the log: what is resumed, what was damaged, what has changed."""

    @property
    def progress(self) -> dict[str, Any]:
        """The fields of ``Progress``."""
        return self.state.get("progress", {})

    @property
    def log_sizes(self) -> dict[str, int]:
        """Bytes of each log, by its name, up to there."""
        return self.state.get("logs", {})

    @torch.no_grad()
    def restore(
        self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer,
        ema: "Ema | None",
    ) -> None:
        """Puts a checkpoint's state, if there is one, into what trains, tensor by tensor.

        Raises:
            UserError: the state does not fit the optimizer.
        """
        if self.path is None:
            return
        state, is_main = self.state, accelerator.is_main_process

        def tensors(file: str) -> Callable[[str], Tensor]:
            opened = safe_open(self.path / file, "pt") if is_main else None
            return lambda name: agreement.tensor_from_main(
                opened.get_tensor(name) if is_main else None, *state["tensors"][file][name],
                accelerator.device,
            )

        try:
            tensor = tensors(MODEL)
            for name, own in model_tensors(module).items():
                shards.fill(own, tensor(name))
            load_optimizer(optimizer, module, state["optimizer"], tensors(OPTIMIZER))
            if ema is not None:
                tensor = tensors(EMA)
                ema.load({name: tensor(name) for name in state["tensors"][EMA]})
        except (SafetensorError, ValueError, LookupError) as error:
            raise UserError(f"run_dir: {self.path} does not fit this run: {error}; choose "
                            "another --run_dir") from error
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])


def identity(seed: int, batch: "BatchOptions", data_fingerprint: str) -> dict[str, Any]:
    """What must be the same before and after an interruption, by option."""
    return {"seed": seed, "batch.global_size": batch.global_size,
            "batch.micro_size": batch.micro_size, "data": data_fingerprint}


def find_newest(
    folder: Path, identity: dict[str, Any], tensors: dict[str, list], total_steps: int
) -> dict[str, Any]:
    """The newest whole checkpoint, as JSON that the other processes can be told.

    Args:
        identity: what must be the same before and after an interruption.
        tensors: types and shapes of the model's.

    Returns:
        ``damaged``: by name, why it cannot be used; ``name`` and ``state`` of the newest whole one,
        or ``refused``: why the run must not go on.
    """
    damaged: dict[str, str] = {}
    for path in reversed(step_folders(folder)):
        try:
            files = durable.verify_folder(path)
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if missing := {STATE, *state["tensors"]} - files:
                raise durable.Damaged(f"{durable.MANIFEST}: does not list {min(missing)}")
            if missing := {"progress", "logs", "machine", "optimizer"} - state.keys():
                raise durable.Damaged(f"{STATE}: lacks {min(missing)}")
            refusal = _refusal(path, state, identity, tensors, total_steps)
        except (
            durable.Damaged, OSError, ValueError, LookupError, TypeError, AttributeError,
            RecursionError,
        ) as error:
            damaged[path.name] = str(error)
            continue
        if refusal is not None:
            return {"damaged": damaged, "refused": refusal}
        return {"damaged": damaged, "name": path.name, "state": state}
    if not damaged:
        return {"damaged": {}}
    return {"damaged": damaged, "refused": (
        f"run_dir: no checkpoint in {folder} is whole, and a fresh start would overwrite what is "
        "left of this run; bring one back, choose another --run_dir, or remove that folder"
    )}


def _refusal(
    path: Path, state: dict[str, Any], identity: dict[str, Any], tensors: dict[str, list],
    total_steps: int,
) -> str | None:
    """Why a whole checkpoint cannot be resumed by this run."""
    if state["format"] > FORMAT:
        return (f"run_dir: {path} has format {state['format']}, this code reads up to {FORMAT}; go "
                "on with the code that wrote it")
    for name, here in identity.items():
        there = state["identity"][name]
        if there != here and name == "data":
            return ("data.source: these are not the data that the run was trained on so far "
                    f"(fingerprint {there} there, {here} here); {_WAY_OUT}")
        if there != here:
            return f"{name}: {there} in the run so far, {here} here; {_WAY_OUT}"
    there = state["tensors"][MODEL]
    for name in there | tensors:
        if there.get(name) != tensors.get(name):
            return (f"model: not that of the run so far: {name} is {there.get(name)} there, "
                    f"{tensors.get(name)} here; {_WAY_OUT}")
    if state["step"] > total_steps:
        return (f"loop.duration: the run stands at step {state['step']} and would end at step "
                f"{total_steps}; make it longer")
    return None
