"""Write a trained model as a file that runs without this repository.

    python -m trainlib.export runs/digits --to torch_export            # model.pt2, for torch alone
    python -m trainlib.export runs/digits --to onnx --out digits.onnx  # for onnxruntime
    python -m trainlib.export copied/best --to torch_export --out best.pt2

RUN is a run folder, or its best/ or final/ alone. The file takes raw inputs, as they come from the
data: their scale is part of it. Any number of samples goes in at once; their shape is fixed. It is
checked against the net itself before it appears.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from trainlib import durable
from trainlib.card import add_exports
from trainlib.config import UserError, parse_yaml
from trainlib.exported import ABOUT, FILES, by_task, describe, in_words, loading_snippet
from trainlib.finished import WEIGHTS, Finished
from trainlib.user_code import describe_error, import_package

__all__ = ["export", "main"]

BATCH_SIZES = (1, 2, 5)  # that a file is checked at
TOLERANCE = {"torch_export": 1e-5, "onnx": 1e-4}
"""Largest difference in units of the largest output. fp32 has 6e-8; sums of some thousand terms,
one after another, in another order stay within 1e-5. onnxruntime also fuses layers, folds batch
norms into kernels and has its own exponentials, layer after layer. A wrong graph (another scale, a
dropout that drops, samples that see each other) is off by 1e-2 or more."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MOST_BYTES = 2**31 - 2**20  # of an ONNX file: protobuf has no more


class _Outputs(nn.Module):
    """A net with what it returns reduced to a tensor, or one for each task."""

    def __init__(self, net: nn.Module, tasks: list[str]):
        super().__init__()
        self.net, self.tasks = net, tasks

    def forward(self, inputs: Tensor) -> Tensor | dict[str, Tensor]:
        output = self.net(inputs)
        if not isinstance(output, Mapping):
            return self._shared(output)
        if set(self.tasks) <= set(output):
            picked = {name: output[name] for name in self.tasks}
            return picked if len(picked) > 1 else picked[self.tasks[0]]
        return self._shared(next(output[key] for key in ("logits", "out") if key in output))

    def _shared(self, output: Tensor) -> Tensor | dict[str, Tensor]:
        """One output for all tasks."""
        if len(self.tasks) == 1:
            return output
        return {name: output.clone() for name in self.tasks}


def export(run: Finished, to: str, file: Path, shape: list[int] | None = None) -> list[str]:
    """Writes the file once it has been checked.

    Args:
        to: ``torch_export`` or ``onnx``.
        shape: of one sample; none: as the run was trained on.

    Returns:
        Lines about what it takes, what it gives, and how exactly.

    Raises:
        UserError: the net cannot be exported, gives something else then, or the file cannot be
            written.
    """
    if to == "onnx":
        _need_onnx()
    shape, dtype = _sample(run, shape)
    net = _Outputs(run.module, list(run.kinds)).eval()
    with torch.no_grad():
        try:
            samples = {size: _random_inputs(run, (size, *shape), dtype) for size in BATCH_SIZES}
            wanted = {size: net(inputs) for size, inputs in samples.items()}
        except Exception as error:  # whatever a net of the user's own raises
            raise UserError(f"{run.folder}: the net cannot take inputs of shape {shape}: "
                            f"{describe_error(error)}") from error
        about = describe(run, shape, dtype, wanted[1])
        part = file.with_name(f".part_{file.name}")
        try:
            write = _write_program if to == "torch_export" else _write_onnx
            loaded = write(net, samples[2], about, part, run)
            difference, largest = 0.0, 0.0
            for size, inputs in samples.items():
                found = loaded(inputs)
                for name, expected in by_task(wanted[size], run).items():
                    given = found[name]
                    if given.shape != expected.shape:
                        raise UserError(f"--to {to}: of {size} samples it gives "
                                        f"{list(given.shape)}, the net {list(expected.shape)}")
                    distance = (given.double() - expected.double()).abs().max().item()
                    difference = max(difference, math.inf if math.isnan(distance) else distance)
                    largest = max(largest, expected.abs().max().item())
            allowed = TOLERANCE[to] * largest
            if not difference <= allowed:
                raise UserError(
                    f"--to {to}: the exported model differs from the net by {difference:.3g}, more "
                    f"than rounding does ({allowed:.3g}); nothing was written")
            part.replace(file)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror or error}); choose "
                            "another --out, or make room") from error
        finally:
            with contextlib.suppress(OSError):  # there was none, or its name cannot be
                part.unlink()
    sizes = ", ".join(map(str, BATCH_SIZES))
    return [*in_words(about), f"largest difference from the net at {sizes} random samples: "
            f"{difference:.3g} (outputs reach {largest:.3g}, allowed {allowed:.3g})"]


def _sample(run: Finished, shape: list[int] | None) -> tuple[list[int], str]:
    """Shape and dtype of one sample."""
    known = shape or run.model.input_shape
    if known is None:
        raise UserError(f"{run.folder}: its config.yaml does not say the shape of an input, which "
                        'newer runs write down; give it: --shape "[1, 28, 28]"')
    guess = "int64" if (run.config.get("data") or {}).get("tokenizer") else "float32"
    return list(known), run.model.input_dtype or guess


def _random_inputs(run: Finished, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Images from 0 to 1, numbers of the training's mean and deviation, tokens that there are."""
    random = torch.Generator().manual_seed(shape[0])
    if dtype == "int64":
        return torch.randint(0, run.vocab_size or 2, shape, generator=random).to(run.device)
    if len(shape) == 4:
        return torch.rand(shape, generator=random).to(run.device)
    values = torch.randn(shape, generator=random).to(run.device)
    if hasattr(run.module, "input_mean"):
        values = values * run.module.input_deviation + run.module.input_mean
    return values


# ---- the two formats: each writes a file, and loads it again as one would who has only that ----

_ANY_NUMBER = ({0: torch.export.Dim("batch", min=1, max=2**20)},)  # of samples
_Loaded = Callable[[Tensor], dict[str, Tensor]]


def _write_program(
    net: nn.Module, inputs: Tensor, about: dict[str, Any], file: Path, run: Finished
) -> _Loaded:
    net.to(memory_format=torch.contiguous_format)  # the file's writer doubts other layouts
    try:
        program = torch.export.export(net, (inputs,), dynamic_shapes=_ANY_NUMBER)
    except Exception as error:  # torch's of many types, and the net's own
        raise UserError(_refusal(run, "torch_export", error)) from error
    for graph in program.graph_module.modules():  # paths of this machine
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    program._example_inputs = None  # which the file would hold as a pickle
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={ABOUT: json.dumps(about, indent=1)})
    file.write_bytes(content.getvalue())
    model = torch.export.load(io.BytesIO(file.read_bytes())).module()
    return lambda inputs: by_task(model(inputs), run)


def _write_onnx(
    net: nn.Module, inputs: Tensor, about: dict[str, Any], file: Path, run: Finished
) -> _Loaded:
    import onnxruntime

    if sum(p.nbytes for p in net.state_dict().values()) > _MOST_BYTES:
        raise UserError(f"--to onnx: {run.folder}: the weights are more than the 2 GiB that one "
                        "file holds; use --to torch_export")
    names = list(about["tasks"])
    try:
        said = io.StringIO()  # it tells its steps on stdout
        with contextlib.redirect_stdout(said), warnings.catch_warnings(action="ignore"):
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = torch.onnx.export(
                net.cpu(), (inputs.cpu(),), dynamo=True, input_names=["inputs"],
                output_names=names, external_data=False, verbose=False,
                dynamic_shapes=_ANY_NUMBER,
            )
            program.model.metadata_props[ABOUT] = json.dumps(about)
            program.save(str(file), external_data=False)
    except OSError:
        raise
    except Exception as error:
        raise UserError(_refusal(run, "onnx", error)) from error
    finally:
        net.to(run.device)
    # From memory: weights in a second file would pass unseen.
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])

    def loaded(inputs: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {"inputs": inputs.cpu().numpy()})
        return {name: torch.from_numpy(output).to(run.device)
                for name, output in zip(names, outputs, strict=True)}

    return loaded


def _refusal(run: Finished, to: str, error: Exception) -> str:
    return (f"--to {to}: {run.config['model']['name']} cannot be exported for any number of "
            f"samples: {describe_error(error)[:400]}")


def _need_onnx() -> None:
    missing = []
    for package in _ONNX_PACKAGES:
        try:
            import_package(package)
        except ValueError:
            missing.append(package)
    if missing:
        raise UserError("--to onnx: needs packages that are not installed: pip install "
                        f"{' '.join(missing)} (requirements-extra.txt names the versions)")


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        "python -m trainlib.export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or its best/ or final/")
    add("--to", required=True, choices=FILES, help="the format")
    add("--out", type=Path, metavar="FILE",
        help="default: model.pt2 or model.onnx in the folder of the weights")
    add("--weights", choices=WEIGHTS, help="of a run folder (default: best)")
    add("--shape", metavar="LIST", help='of one sample, as "[3, 64, 64]" (default: the run\'s)')
    options = parser.parse_args(arguments)
    try:
        run = Finished(options.run, options.weights)
        file = options.out or run.folder / FILES[options.to]
        if file.suffix != Path(FILES[options.to]).suffix:
            raise UserError(f"--out: the name ends with {Path(FILES[options.to]).suffix}, got "
                            f"{file}")
        if not file.parent.is_dir():
            raise UserError(f"--out: there is no folder {file.parent}")
        lines = export(run, options.to, file, _shape(options.shape))
    except UserError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    print(f"{file}; to load it, with no more than "
          f"{'torch' if options.to == 'torch_export' else 'onnxruntime and numpy'}:\n")
    snippet = _snippet(run, options.to, file.name)
    print("".join(f"    {line}\n" for line in snippet.splitlines()), end="")
    if file.resolve().parent == run.folder.resolve():
        _show_in_card(run)
    return 0


def _snippet(run: Finished, to: str, file: str) -> str:
    binary = frozenset(name for name, task in run.config["tasks"].items()
                       if run.kinds[name] == "segmentation" and task.get("loss") == "bce")
    return loading_snippet(to, run.kinds, file, binary)


def _show_in_card(run: Finished) -> None:
    """Has the model card beside the weights show how to load what has been exported there."""
    card = run.folder / "README.md"
    suffixes = {Path(file).suffix: to for to, file in FILES.items()}
    files = sorted(file.name for file in run.folder.iterdir() if file.suffix in suffixes)
    snippets = {file: _snippet(run, suffixes[Path(file).suffix], file) for file in files}
    try:
        durable.write_text(card, add_exports(card.read_text(encoding="utf-8"), snippets))
    except (OSError, ValueError) as error:  # of an older run, or one's own
        print(f"export: {card}: not changed ({error})", file=sys.stderr)
    else:
        print(f"\n{card} shows it, too")


def _shape(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        shape = parse_yaml(text)
    except yaml.YAMLError:
        shape = None
    if (not isinstance(shape, list) or not shape
            or not all(type(s) is int and s >= 1 for s in shape)):
        raise UserError(f'--shape: a list of whole numbers such as "[3, 64, 64]", got {text!r}')
    return shape


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
