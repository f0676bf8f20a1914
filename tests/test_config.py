"""Recipes and flags: deep merge, strict names, all mistakes at once."""

import pytest
from pydantic import Field

from train import TrainOptions
from trainlib import config


def read(*arguments):
    return config.read(TrainOptions, list(arguments), "script")


def mistakes(*arguments):
    with pytest.raises(config.UserError) as caught:
        read(*arguments)
    return str(caught.value).splitlines()


def test_flags_win_over_recipes_and_later_recipes_over_earlier(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 1e-2, args: {betas: [0.9, 0.99]}}\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 2e-2, args: {eps: 1e-6}}\n")
    a, b = (f"--recipe={tmp_path}/{name}.yaml" for name in "ab")
    options = read("--seed", "3", a, b)
    assert (options.seed, options.optim.lr) == (3, 0.02)
    assert options.optim.args == {"betas": [0.9, 0.99], "eps": 1e-6}
    assert read(b, a).optim.lr == 0.01


def test_flags_reach_into_mappings_that_have_no_declared_keys():
    options = read("--model.args.hidden", "[256,128]", "--tasks.digit.loss_args.gamma", "2",
                   "--tasks.digit.loss=focal")
    assert options.model.args == {"hidden": [256, 128]}
    assert options.tasks["digit"].loss == "focal" and options.tasks["digit"].loss_args["gamma"] == 2


def test_null_empties_a_mapping():
    assert read("--model.args.depth", "8", "--model.args", "null").model.args == {}
    assert read("--model.args", "null", "--tasks", "null") == TrainOptions()
    assert read("--optim.max_grad_norm", "null").optim.max_grad_norm is None


@pytest.mark.parametrize("text, value", [
    ("1e-3", 1e-3), ("1E3", 1000.0), ("-2e-1", -0.2), ("1.5e3", 1500.0), ("2.e2", 200.0),
    ("+.5e1", 5.0),
])
def test_scientific_notation_is_a_number_everywhere(text, value):
    assert read("--optim.args.eps", text).optim.args == {"eps": value}


def test_a_flag_without_a_value_is_a_switch():
    assert read("--deterministic").deterministic
    assert read("--deterministic", "--seed", "1").deterministic
    assert not read("--deterministic", "false").deterministic


def test_a_number_can_be_a_name():
    assert read("--run_dir", "2024").run_dir == "2024"


@pytest.mark.parametrize("name", ["2026-01-31", "2026-13-01", "2026-01-31 12:00:00"])
def test_a_date_can_be_a_name(name):
    assert read("--run_dir", name, "--log.name", name).log.name == name


def test_all_mistakes_are_reported_at_once_each_with_its_path(tmp_path):
    (tmp_path / "bad.yaml").write_text("optim: {learning_rat: 1}\nsede: 3\n")
    lines = mistakes("--recipe", f"{tmp_path}/bad.yaml", "--batch.global_size", "0",
                     "--loop.duration", "ten", "--optim.lr", "fast", "stray")
    text = "\n".join(lines)
    assert len(lines) == 6
    for part in ("'optim.learning_rat'", "'sede'; did you mean 'seed'?", "batch.global_size",
                 '"20 epochs"', "given: 'ten'", "optim.lr", "'stray'"):
        assert part in text


@pytest.mark.parametrize("flag, hint", [
    ("--optim.weight_dacay", "did you mean 'optim.weight_decay'?"),
    ("--batch.size", "batch.global_size"),
    ("--tasks.digit.los", "did you mean 'tasks.digit.loss'?"),
])
def test_an_unknown_name_comes_with_the_nearest(flag, hint):
    [line] = mistakes(flag, "1")
    assert hint in line


def test_a_micro_batch_larger_than_the_batch_is_refused():
    [line] = mistakes("--batch.micro_size", "65")
    assert "batch.micro_size: 65 is more than batch.global_size 64" in line


@pytest.mark.parametrize("content, message", [
    ("- a\n", "a recipe is a mapping"), ("a: [", "not valid YAML"),
    ("seed: 1\nseed: 2\n", "'seed' stands twice"),
    ("seed: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
])
def test_a_recipe_that_is_none_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    [line] = mistakes("--recipe", f"{tmp_path}/r.yaml")
    assert "r.yaml" in line and message in line


def test_a_missing_recipe_is_named():
    [line] = mistakes("--recipe", "nowhere.yaml")
    assert "nowhere.yaml" in line and "No such file" in line


def test_the_printed_config_reads_back_to_the_same_options(tmp_path, capsys):
    flags = ["--optim.lr", "3e-5", "--model.args.hidden", "[8]", "--tasks.digit.weight", "2",
             "--run_dir", "2026-01-31", "--log.name", "'1e3'", "--log.notes", "'1.5e3'"]
    with pytest.raises(SystemExit) as stop:
        read(*flags, "--print_config")
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read("--recipe", f"{tmp_path}/printed.yaml") == read(*flags)


def test_help_shows_every_option_with_type_default_and_sentence(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    for name, _, default, sentence in config.describe_options(TrainOptions):
        assert f"--{name}  (" in text and " ".join(sentence.split()) in text
        assert f"default: {'none' if default is None else default}" in text
    assert "--log.histograms  (str or none, default: none)" in text
    assert "Annotated" not in text


def test_options_are_immutable_and_merging_leaves_its_arguments_alone():
    base, override = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert config.merge(base, override) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}} and override == {"a": {"c": 2}}

    class Some(config.Options):
        value: int = Field(1)

    with pytest.raises(Exception, match="frozen"):
        Some().value = 2


def test_the_runs_name_comes_from_the_last_recipe():
    assert config.recipe_name([]) == "default"
    assert config.recipe_name(["--recipe", "x/a.yaml", "--recipe=y/b.yaml"]) == "b"
    assert config.recipe_name(["--recipe=y/b.yaml", "--recipe", "x/a.yaml"]) == "a"
