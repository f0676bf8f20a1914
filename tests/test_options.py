"""No dead option: each one changes something, and the test that shows it stands in one table.

What no other file shows is shown here, most of it by runs of three steps in this process.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from launching import records, weights
from torch import nn

import distill
import lr_find
import train
from trainlib import distillation
from trainlib.config import describe_options
from trainlib.distillation.options import TeacherOptions

TESTS = Path(__file__).parent
OF_A_TEACHER = "distill.teachers[]."  # in a list, of which the help tells by their sentence only
QUIET = ["--log.trackers", "[]", "--log.report", "false"]
SHORT = [*QUIET, "--loop.duration", "3 steps", "--log.every", "1", "--batch.global_size", "16",
         "--batch.micro_size", "8"]
RESNET = ["--model.name", "resnet", "--model.args.width", "4"]
FUNCTION = "def darker(images):\n    return images / 2\n"

# By option, what it is set to in a run of train.py that gives other weights with it than without.
TRAINED = {
    "data.augment.rotation": "20", "data.augment.crop": "2", "data.augment.flip": "0.5",
    "data.augment.brightness": "0.3", "data.augment.contrast": "0.3",
    "data.augment.function": "{folder}/function.py:darker", "data.augment.cutout": "3",
    "data.augment.mixup": "0.4", "data.augment.cutmix": "1", "data.normalize": "false",
    "model.name": "resnet", "model.args": "{hidden: [8]}", "batch.global_size": "24",
    "optim.name": "rmsprop", "optim.lr": "0.01", "optim.args": "{eps: 0.1}",
    "optim.layer_decay": "0.5", "schedule.args": "{power: 3}", "tasks.digit.loss": "focal",
    "tasks.digit.loss_args": "{label_smoothing: 0.3}",
}
# The same of distill.py.
DISTILLED = {
    "distill.loss": "reverse_kl", "distill.loss_args": "{beta: 0.3}",
    "distill.teachers": "[{folder}/1]", "distill.temperature": "2",
    "distill.standardize": "true", "distill.kd_weight": "0.5", "distill.hard_weight": "0.5",
    "distill.tasks.digit.loss": "reverse_kl", "distill.tasks.digit.loss_args": "{beta: 0.3}",
    "distill.features.stem -> stem.loss": "cosine", "distill.features.stem -> stem.weight": "5",
    "distill.features.stem -> stem.teacher": "1",
}
# What both runs of a comparison are given, by option.
GIVEN = {
    "schedule.args": ["--schedule.name", "polynomial"],
    "distill.loss_args": ["--distill.loss", "jsd"],
    "distill.tasks.digit.loss_args": ["--distill.tasks.digit.loss", "jsd"],
    "distill.features.stem -> stem.teacher": ["--distill.teachers", "[{folder}/0, {folder}/1]"],
} | dict.fromkeys(["distill.features.stem -> stem.loss", "distill.features.stem -> stem.weight"],
                  ["--distill.features", "{stem -> stem: {}}"])

# Where each option is shown to change something: of a test, the options that it fails without.
SHOWN_BY = {
    "test_decoding.py": {
        "test_columns_are_taken_by_name_in_that_order_or_all_numbers_but_the_target": "data.input",
        "test_channels_are_those_of_the_first_image_or_as_chosen": "data.channels",
        "test_images_are_scaled_to_cover_the_size_and_cut_about_the_centre": "data.image_size",
    },
    "test_diagnosis.py": {
        "test_a_planted_fault_is_named": "diagnose",
    },
    "test_distill.py": {
        "test_the_warm_up_is_a_line_from_zero": "distill.warmup",
        "test_several_teachers_teach_as_their_average":
            "distill.average distill.teachers[].run distill.teachers[].weight",
        "test_a_cache_of_another_teacher_is_refused": "distill.cache distill.cache_dir",
        "test_top_k_of_all_tokens_is_the_whole_distribution": "distill.cache_top_k",
        "test_the_built_in_job_makes_its_teacher_then_the_student_alone_then_the_student":
            "distill.baseline distill.teachers[].recipe",
        "test_the_average_of_the_student_teaches_it": "distill.teachers[].ema",
        "test_a_teacher_by_model_and_weights_is_the_run_it_was_taken_from":
            "distill.teachers[].model distill.teachers[].weights",
        "test_a_teacher_has_its_own_precision_and_compiler": "distill.teachers[].precision",
    },
    "test_export.py": {
        "test_the_file_says_what_the_net_says_in_an_empty_folder":
            "model.input_shape model.input_dtype",
    },
    "test_features.py": {
        "test_gradients_are_clamped_to_the_value": "optim.max_grad_value",
        "test_the_average_is_what_is_evaluated_and_exported": "optim.ema_half_life",
    },
    "test_hangs.py": {
        "test_a_collective_that_times_out_ends_with_code_5": "comm.start_timeout comm.step_timeout",
        "test_a_hang_in_a_sweep_is_noticed": "comm.hang_after",
    },
    "test_kinds.py": {
        "test_multilabel_with_thresholds_and_missing_entries": "tasks.<name>.thresholds",
        "test_classification_counts_top_k_and_calibration": "tasks.<name>.top_k",
    },
    "test_language.py": {
        "test_texts_as_inputs_are_padded_to_the_longest_but_at_most_block_size":
            "data.tokenizer data.block_size",
        "test_another_file_is_validated_on_whole": "data.packing",
        "test_texts_are_inputs_of_other_kinds_of_tasks": "tasks.<name>.kind",
    },
    "test_lr_find.py": {
        "test_apply_without_an_answer_leaves_no_recipe_of_an_earlier_sweep": "apply",
        "test_the_same_curve_and_answer_on_any_number_of_processes": "sweep.repeats",
        "test_verifying_looks_beyond_either_end": "sweep.verify",
    },
    "test_memory.py": {
        "test_an_evaluation_that_runs_out_names_its_own_option": "batch.eval_size",
    },
    "test_models.py": {
        "test_what_is_frozen_keeps_its_weights_and_statistics_in_training":
            "model.init_from model.freeze",
        "test_a_compiled_run_and_one_in_channels_last_are_the_same_to_rounding":
            "model.channels_last",
        "test_gradient_checkpointing_recomputes_the_same_gradients": "model.gradient_checkpointing",
    },
    "test_predictions.py": {
        "test_none_is_kept_to_look_at_if_none_is_wanted": "log.examples",
    },
    "test_preflight.py": {
        "test_the_state_is_that_of_the_optimizer": "dry_run",
        "test_a_folder_in_use_is_refused_and_stays_locked": "checkpoint.steal_lock",
    },
    "test_profiling.py": {
        "test_a_profile_changes_no_weight": "profile",
    },
    "test_reading.py": {
        "test_workers_go_on_from_step_to_step_and_end_with_their_reader":
            "data.in_memory data.workers",
    },
    "test_scripts.py": {
        "test_options_change_the_weights": (
            "seed schedule.name schedule.warmup schedule.final_fraction optim.weight_decay "
            "optim.max_grad_norm tasks.<name>.weight batch.micro_size batch.exact_sum"
        ),
        "test_early_stopping_is_agreed_and_names_the_result": "loop.patience",
    },
    "test_sources.py": {
        "test_every_format_of_one_table_gives_the_same_tensors": "data.source",
        "test_a_data_set_of_the_hub_is_asked_for_by_subset_and_revision":
            "data.revision data.subset",
        "test_the_validation_split_is_the_one_named_or_found_or_a_tenth":
            "data.train_split data.validation_split",
    },
    "test_spikes.py": {
        "test_a_spike_is_skipped_listed_and_said": "loop.on_spike",
    },
    "test_targets.py": {
        "test_class_labels_of_minus_1_and_the_ignored_value_are_missing":
            "tasks.<name>.ignore_index",
        "test_labels_come_from_columns_and_lists_alike": "tasks.<name>.label_names",
    },
    "test_tasks.py": {
        "test_a_task_may_predict_a_column_that_is_no_candidate": "tasks.<name>.target",
    },
    "test_terminal.py": {
        "test_where_no_line_can_be_written_over_there_are_plain_ones": "log.print_every",
    },
    "test_trackers.py": {
        "test_a_run_is_in_wandb_as_it_is_in_its_folder": (
            "log.project log.name log.group log.job_type log.tags log.notes log.histograms "
            "log.upload_model"
        ),
    },
    "test_unused.py": {
        "test_several_processes_on_cpus_cannot_share_them": "model.sync_batch_norm",
    },
    "test_options.py": {
        "test_the_files_and_records_of_a_run_are_those_asked_for": (
            "run_dir loop.duration loop.eval_every checkpoint.every checkpoint.keep log.every "
            "log.trackers log.report"
        ),
        "test_torch_computes_as_asked": "deterministic cpu_threads",
        "test_a_backend_is_handed_to_torch": "model.compile distill.teachers[].compile",
        "test_train_py_gives_other_weights": (
            "data.augment.rotation data.augment.crop data.augment.flip data.augment.brightness "
            "data.augment.contrast data.augment.function data.augment.cutout data.augment.mixup "
            "data.augment.cutmix data.normalize model.name model.args batch.global_size "
            "optim.name optim.lr optim.args optim.layer_decay schedule.args tasks.<name>.loss "
            "tasks.<name>.loss_args"
        ),
        "test_a_pickle_is_read_where_it_is_allowed": "model.allow_pickle",
        "test_the_best_weights_are_those_of_the_monitor": "loop.monitor",
        "test_how_slow_is_slow_reaches_the_sums_that_compare": "comm.slow_factor",
        "test_distill_py_gives_other_weights": (
            "distill.loss distill.loss_args distill.teachers distill.temperature "
            "distill.standardize distill.kd_weight distill.hard_weight distill.tasks.<name>.loss "
            "distill.tasks.<name>.loss_args distill.features.<name>.loss "
            "distill.features.<name>.weight distill.features.<name>.teacher"
        ),
        "test_a_teacher_by_model_scales_its_inputs_as_told":
            "distill.teachers[].mean distill.teachers[].deviation",
        "test_a_sweep_tries_the_rates_asked_for":
            "sweep.lr_min sweep.lr_max sweep.steps sweep.spacing",
    },
}
SHOWN = {option: f"{file}::{test}" for file, tests in SHOWN_BY.items()
         for test, options in tests.items() for option in options.split()}


def test_each_option_stands_in_the_table_once():
    known = {name for script in (train.TrainOptions, distill.StudentOptions, lr_find.FindOptions)
             for name, *_ in describe_options(script)}
    known |= {OF_A_TEACHER + name for name, *_ in describe_options(TeacherOptions)}
    listed = " ".join(options for tests in SHOWN_BY.values() for options in tests.values()).split()
    assert sorted(listed) == sorted(known)


@cache
def definitions(file: str) -> dict[str, tuple[str, set[str]]]:
    """The source of each function and value at the top of a file of tests, and the names in it."""
    text = (TESTS / file).read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = [node.name] if hasattr(node, "name") else [
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        used = {getattr(part, "id", getattr(part, "arg", None)) for part in ast.walk(node)}
        for name in names:
            found[name] = "\n".join(lines[first - 1: node.end_lineno]), used
    return found


def test_each_test_of_the_table_is_there_and_names_its_options():
    """Itself or in what it uses of its file: a table, a helper, a fixture."""
    for option, place in SHOWN.items():
        file, _, test = place.partition("::")
        found = definitions(file)
        assert test in found, f"{place} is gone; name another in SHOWN_BY, or write one"
        source, used = found[test]
        source = "\n".join(
            [source, *(found[name][0] for name in used & found.keys() - {"SHOWN_BY"})])
        path, leaf = re.escape(option).replace("<name>", "[^.]+"), option.rpartition(".")[2]
        # As --a.b or in words of its own: b=..., b: ... or "b".
        pattern = rf"{path}\b|\b{leaf}(=|: )|[\"']{leaf}[\"']"
        assert re.search(pattern, source), f"{place} does not name {option}"


# ---- runs of a few steps ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """From a script's main and flags to the weights after a short run, each made once; folders 0
    and 1 hold teachers."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    (folder / "function.py").write_text(FUNCTION)
    torch.set_num_threads(1)
    for seed in ("0", "1"):
        train.main(["--run_dir", str(folder / seed), *SHORT, *RESNET, "--seed", seed])

    def run(main, *flags):
        if (main, *flags) not in made:
            run_dir = folder / f"run {len(made)}"
            filled = [flag.replace("{folder}", str(folder)) for flag in flags]
            main(["--run_dir", str(run_dir), *SHORT, *filled])
            made[main, *flags] = weights(run_dir)
        return made[main, *flags]

    return run


def differ(first: dict, second: dict) -> bool:
    return first.keys() != second.keys() or any(
        not (tensor.shape == second[name].shape and tensor.equal(second[name]))
        for name, tensor in first.items())


@pytest.mark.parametrize("option", TRAINED)
def test_train_py_gives_other_weights(option, finished):
    given = GIVEN.get(option, [])
    changed = finished(train.main, *given, f"--{option}", TRAINED[option])
    assert differ(changed, finished(train.main, *given))


@pytest.mark.parametrize("option", DISTILLED)
def test_distill_py_gives_other_weights(option, finished):
    given = [*RESNET, "--distill.teachers", "[{folder}/0]", *GIVEN.get(option, [])]
    changed = finished(distill.main, *given, f"--{option}", DISTILLED[option])
    assert differ(changed, finished(distill.main, *given))


def test_the_files_and_records_of_a_run_are_those_asked_for(tmp_path):
    run = tmp_path / "run"
    train.main(["--run_dir", str(run), *QUIET, "--loop.duration", "8 steps", "--loop.eval_every",
                "5 steps", "--log.every", "3", "--checkpoint.every", "2 steps",
                "--checkpoint.keep", "3"])
    names = {path.name for path in run.iterdir()}
    assert {"best", "final"} <= names and not names & {"wandb", "wandb_run.json", "report.html"}
    assert [row["step"] for row in records(run) if "train/loss" in row] == [3, 6, 8]
    assert [row["step"] for row in records(run) if "eval/loss" in row] == [5, 8]
    kept = sorted(path.name[-1] for path in (run / "checkpoints").glob("step_*"))
    assert kept == ["4", "6", "8"]


def test_the_best_weights_are_those_of_the_monitor(tmp_path):
    """At a rate this high the loss leaps up, and falls long after the accuracy's best."""
    train.main(["--run_dir", str(tmp_path), *SHORT, "--loop.duration", "12 steps",
                "--loop.eval_every", "1 step", "--optim.lr", "0.3", "--loop.monitor", "eval/loss"])
    rows = [row for row in records(tmp_path) if "eval/loss" in row]
    lowest = min(rows, key=lambda row: row["eval/loss"])
    best = json.loads((tmp_path / "best" / "evaluation.json").read_text())["digit"]
    assert best["loss"] == lowest["eval/loss"]
    assert best["accuracy"] < max(row["eval/accuracy"] for row in rows)


def test_torch_computes_as_asked(tmp_path, monkeypatch):
    asked = []
    for name in ("set_num_threads", "use_deterministic_algorithms"):
        monkeypatch.setattr(torch, name, lambda value, name=name: asked.append((name, value)))
    train.main(["--run_dir", str(tmp_path), *SHORT, "--cpu_threads", "3", "--deterministic"])
    assert asked == [("use_deterministic_algorithms", True), ("set_num_threads", 3)]


def test_a_backend_is_handed_to_torch(tmp_path, monkeypatch):
    backends = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, backend, **_: backends.append(backend))
    train.main(["--run_dir", f"{tmp_path}/first", *SHORT, "--model.compile", "eager"])
    teacher = f"{{run: {tmp_path}/first, compile: aot_eager}}"
    distill.main(["--run_dir", f"{tmp_path}/second", *SHORT, "--distill.teachers", f"[{teacher}]"])
    assert backends == ["eager", "aot_eager"]


def test_a_teacher_by_model_scales_its_inputs_as_told(tmp_path, monkeypatch):
    kept, build = [], distillation.build_teachers

    def spied(*arguments):
        kept.extend(build(*arguments))
        return kept

    monkeypatch.setattr(distillation, "build_teachers", spied)
    train.main(["--run_dir", f"{tmp_path}/first", *SHORT])
    teacher = (f"{{model: {{name: mlp}}, weights: {tmp_path}/first/final, mean: [3.0], "
               "deviation: [7.0]}")
    distill.main(["--run_dir", f"{tmp_path}/second", *SHORT, "--distill.teachers", f"[{teacher}]"])
    [one] = kept
    assert (one.module.input_mean.item(), one.module.input_deviation.item()) == (3, 7)


def test_a_pickle_is_read_where_it_is_allowed(tmp_path):
    train.main(["--run_dir", f"{tmp_path}/first", *SHORT])
    torch.save(weights(tmp_path / "first"), tmp_path / "w.pt")
    train.main(["--run_dir", f"{tmp_path}/second", *SHORT, "--model.init_from", f"{tmp_path}/w.pt",
                "--model.allow_pickle"])
    assert differ(weights(tmp_path / "first"), weights(tmp_path / "second"))


@pytest.mark.parametrize("script", [train, distill], ids=["train", "distill"])
def test_how_slow_is_slow_reaches_the_sums_that_compare(tmp_path, monkeypatch, script):
    """What comes of it is in test_hangs.py."""
    given, sums = [], script.StepSums
    monkeypatch.setattr(script, "StepSums", lambda *arguments: (
        given.append(arguments[-1]) or sums(*arguments)))
    more = ["--distill.kd_weight", "0"] if script is distill else []
    script.main(["--run_dir", str(tmp_path), *SHORT, *more, "--comm.slow_factor", "2.5"])
    assert given == [2.5]


@pytest.mark.parametrize("spacing", ["exponential", "linear"])
def test_a_sweep_tries_the_rates_asked_for(tmp_path, spacing):
    lr_find.main(["--run_dir", str(tmp_path), "--batch.global_size", "16", "--batch.micro_size",
                  "8", "--sweep.lr_min", "1e-4", "--sweep.lr_max", "2e-3", "--sweep.steps", "20",
                  "--sweep.spacing", spacing])
    rates = json.loads((tmp_path / "lr_find.json").read_text())["lrs"]
    assert (rates[0], rates[-1], len(rates)) == (1e-4, 2e-3, 20)
    ratio = {"exponential": 20 ** (1 / 19), "linear": 2}[spacing]
    assert rates[1] / rates[0] == pytest.approx(ratio)
