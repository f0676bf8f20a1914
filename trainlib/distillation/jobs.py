"""The runs that a distillation consists of, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainlib.config import Options, UserError, read
from trainlib.distillation.options import DistillOptions, TeacherOptions

ROOT = Path(__file__).resolve().parents[2]
_DEFAULT = TeacherOptions(run="runs/digits_resnet",
                          recipe=str(Path("recipes") / "digits_resnet.yaml"))


def plan_jobs(options: Options, run_dir: str) -> list[Options]:
    """The teachers that are missing, the student alone if it is asked for, and the student.

    Args:
        options: of distill.py.
        run_dir: of the student.

    Raises:
        UserError: no teacher, an average that is not made, no number for two students to share, or
            the mistakes of a teacher's recipe.
    """
    chosen = options.distill
    if options.optim.ema_half_life is None and any(one.ema for one in chosen.teachers or []):
        raise UserError("distill.teachers: ema is the average of the student's weights; set "
                        "optim.ema_half_life, which makes one")
    if chosen.baseline and options.batch.micro_size == "auto":
        raise UserError("distill.baseline: the student alone has to train as the student does, but "
                        "batch.micro_size auto may find it another size, since teachers take "
                        "memory, too; give both the number that RUN_DIR/config.yaml holds after "
                        "auto without distill.baseline, or one of your own")
    if chosen.teaches and chosen.teachers is None:
        if options.data.source != "builtin:digits":
            raise UserError("distill.teachers: none given; name the folder of a run, as in "
                            "--distill.teachers '[runs/large]', or set --distill.kd_weight 0")
        chosen = chosen.replaced({"teachers": [_DEFAULT]})
    student = options.replaced({"run_dir": run_dir, "distill": chosen})
    jobs = [_teacher_job(student, teacher) for teacher in chosen.teachers or []
            if chosen.teaches and teacher.recipe is not None
            and not (Path(teacher.run) / "final").exists()]
    if chosen.baseline and not (Path(run_dir) / "final").exists():
        jobs.append(student.replaced({
            "run_dir": alone_dir(run_dir), "distill": DistillOptions(teachers=[], kd_weight=0.0)}))
    return [*jobs, student]


def alone_dir(run_dir: str | Path) -> str:
    """Where the same student is trained without teachers."""
    return f"{run_dir}_alone"


def _teacher_job(student: Options, teacher: TeacherOptions) -> Options:
    recipe = Path(teacher.recipe)
    recipe = recipe if recipe.exists() else ROOT / recipe
    flags = ["--recipe", str(recipe), "--run_dir", teacher.run, "--distill.kd_weight", "0"]
    try:
        job = read(type(student), flags, "")
    except UserError as error:
        raise UserError(f"distill.teachers: {teacher.run}: {error}") from error
    if job.distill.teachers:
        raise UserError(f"distill.teachers: {teacher.run}: its recipe has teachers of its own; "
                        "make that run first, with distill.py")
    changes = {name: getattr(student, name) for name in ("log", "deterministic", "cpu_threads")}
    return job.replaced(changes)


def run_jobs(
    jobs: list[Options], train: Callable[[Options, object], None], run_folder: type
) -> None:
    """Trains one after the other; what had finished before is passed over.

    Args:
        train: takes the options of a job and its run folder.
        run_folder: makes the folder of a run of its path.
    """
    last = jobs[-1]
    student = run_folder(Path(last.run_dir))
    for job in jobs[:-1]:
        folder = run_folder(Path(job.run_dir))
        folder.on_behalf_of = student
        try:
            train(job, folder)
        except SystemExit as end:
            if end.code != 0:
                raise
        except BaseException as error:  # a signal's, too
            if hasattr(error, "exit_code"):
                folder.close(error.exit_code, str(error))
                run_folder(Path(last.run_dir))  # where a launcher looks for 75: run me again
            raise
        folder.close(0, "finished")
    train(last, run_folder(Path(last.run_dir)))
