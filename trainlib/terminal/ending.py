"""Where everything is at a run's end, and what to do next."""

import shlex
from pathlib import Path

_RESULTS = ("best", "final", "distillation.json")
_RECORDS = ("metrics.jsonl", "bad_steps.jsonl", "profile.txt", "log.txt")
_SUFFIXES = (".html", ".png", ".csv")
_FINISHED, _MISTAKE, _DIVERGED, _NOT_WRITTEN, _OUT_OF_MEMORY = 0, 2, 3, 4, 6


def ending(folder: Path, exit_code: int) -> str:
    """Lines that name the files of a run that ends with this exit code, and commands."""
    drawn = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    drawn.sort(key=lambda name: _SUFFIXES.index(Path(name).suffix))
    names = [f"{name}/" if (folder / name).is_dir() else name
             for name in (*_RESULTS, *drawn, *_RECORDS) if (folder / name).exists()]
    steps = sorted((folder / "checkpoints").glob("step_*"))
    if exit_code != _FINISHED and steps:
        names.insert(0, f"checkpoints/{steps[-1].name}/")
    lines = [f"in {folder}: {', '.join(names)}", *_next(folder, exit_code, bool(steps))]
    if any(folder.glob("wandb/offline-run-*")):
        logs = shlex.quote(str(folder / "wandb"))
        lines += [f"look at it: wandb leet {logs}", f"upload it:  wandb sync {logs}/offline-run-*"]
    return "\n".join(lines)


def _next(folder: Path, exit_code: int, has_checkpoint: bool) -> list[str]:
    if exit_code == _FINISHED:
        return [f"compare it: python -m trainlib.plots {shlex.quote(str(folder))} OTHER_RUN"]
    if exit_code in (_MISTAKE, _OUT_OF_MEMORY):
        return []  # whose own line says what to do
    if exit_code == _DIVERGED:
        return ["next:       a lower --optim.lr, with another --run_dir"]
    if exit_code == _NOT_WRITTEN:
        return ["next:       mend that, then the same command again"]
    from_where = "goes on from there" if has_checkpoint else "starts over: no checkpoint yet"
    return [f"next:       the same command again {from_where}"]
