"""Objects of the user's own, and what is said when they cannot be had."""

import pytest

from trainlib.user_code import describe_error, import_object, is_object_spec


def test_objects_come_from_files_and_from_packages(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    (tmp_path / "net.py").write_text("from neighbour import WIDTH\nclass Net:\n    width = WIDTH\n")
    spec = f"{tmp_path}/net.py:Net"
    assert import_object(spec).width == 3
    assert import_object(spec) is import_object(spec)  # run once
    assert import_object("collections.abc:Sized").__name__ == "Sized"


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "twin.py").write_text(f"def number():\n    return {number}\n")
    assert [import_object(f"{tmp_path}/{n}/twin.py:number")() for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize("text, is_spec", [
    ("net.py:Net", True), ("a/b c/net.py:Net", True), ("torch.optim:SGD", True), ("mlp", False),
    ("net.py", False), ("net.py:", False), ("net.py:1", False), (":Net", False),
])
def test_a_spec_is_a_module_and_a_name(text, is_spec):
    assert is_object_spec(text) == is_spec


@pytest.mark.parametrize("code, spec, message", [
    ("", "missing.py:Net", "there is no file .*missing.py"),
    ("class Net: ...\ndef make(): ...\n", "net.py:Ne", "has no 'Ne'; it has Net, make"),
    ("import os\n", "net.py:Net", "has no 'Net'; it defines no class or function"),
    ("x = 1\ny = 1 / 0\n", "net.py:Net",
     r"ZeroDivisionError: division by zero \(net.py, line 2: y = 1 / 0\)"),
    ("def f(:\n", "net.py:Net", r"SyntaxError: .* \(net.py, line 1: def f\(:\)"),
    ("import torch\nw = torch.zeros(2) @ torch.zeros(3)\n", "net.py:Net",
     r"RuntimeError: .* \(net.py, line 2: w = torch"),
    ("import not_there\n", "net.py:Net", "No module named 'not_there' .*line 1"),
    ("import sys\nsys.exit(3)\n", "net.py:Net", r"SystemExit: 3 \(net.py, line 2: sys.exit"),
    ("assert 1 > 2\n", "net.py:Net", r"imported: AssertionError \(net.py, line 1: assert 1 > 2\)"),
    ("try:\n    {}['k']\nexcept KeyError as error:\n    raise ValueError('bad') from error\n",
     "net.py:Net", r"ValueError: bad \(net.py, line 4: .*\), because of KeyError: 'k' \(net.py, "
                   r"line 2: {}\['k'\]\)"),
    ("from collections import OrderedDict\nclass Net1: ...\n", "net.py:Net", "it has Net1$"),
    ("".join(f"def f{i}(): ...\n" for i in range(10)), "net.py:f11", "it has f1, .* and 2 more$"),
])
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, code, spec, message):
    (tmp_path / "net.py").write_text(code)
    for _ in range(2):  # a file that failed is not half there the next time
        with pytest.raises(ValueError, match=message) as caught:
            import_object(f"{tmp_path}/{spec}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec, message", [
    ("not_there:Net", "the package 'not_there' is not installed: pip install not_there"),
    ("torch.not_there:Net", "there is no module 'torch.not_there'"),
    ("torch.nn:Linnear", "torch.nn has no 'Linnear'; it has Linear, .* and [0-9]+ more"),
    ("mlp", "reads neither like"),
])
def test_what_is_wrong_with_a_package_is_said_in_a_line(spec, message):
    with pytest.raises(ValueError, match=message):
        import_object(spec)


def test_packages_are_named_by_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_there\n")
    (tmp_path / "lazy.py").write_text("def __getattr__(name):\n    raise OSError(name)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="needs_more needs 'not_there', which is not installed: "
                                         "pip install not_there"):
        import_object("needs_more:Net")
    with pytest.raises(ValueError, match="lazy:Net cannot be imported: OSError: Net"):
        import_object("lazy:Net")


def test_an_error_without_a_place_of_the_users_is_its_own_line():
    assert describe_error(ValueError("two\nlines")) == "ValueError: two lines"
