"""The program in a card that loads the weights, and room for those of other formats."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainlib.card.facts import Export, Facts

TOKENIZER = "tokenizer.json"
_BEGIN, _END = "<!-- exports: begin -->", "<!-- exports: end -->"
EXPORTS = f"{_BEGIN}\n{_END}"
"""Where ``add_exports`` writes."""


def add_exports(card: str, loading_snippets: dict[str, str]) -> str:
    """The card with programs that load other formats, instead of those that it had.

    Args:
        card: the text of a README.md.
        loading_snippets: by name of the exported file, Python that loads and runs it.

    Raises:
        ValueError: the card has no place for them.
    """
    if card.count(_BEGIN) != 1 or card.count(_END) != 1:
        raise ValueError(f"README.md: no line {_BEGIN} with {_END} after it")
    parts = [f"### {name}\n\n```python\n{snippet.strip()}\n```\n"
             for name, snippet in loading_snippets.items()]
    before, rest = card.split(_BEGIN)
    after = rest.split(_END)[1]
    return "\n".join([f"{before}{_BEGIN}", *parts, f"{_END}{after}"])


def program(facts: Facts, export: Export) -> str:
    """The Python that loads the weights and runs them on an example."""
    kinds = {task["kind"] for task in facts.tasks.values()}
    needs_labels = kinds != {"language_modeling"}
    needs_json = ["import json", ""] if needs_labels else []
    lines = facts.portable.lines
    packages = [line for line in lines if line.startswith(("import ", "from "))]
    tokenizers = ["from tokenizers import Tokenizer"] if export.tokenizer else []
    third = [line for line in packages if not line.startswith("from net ")]
    imports = sorted(["import torch", *third, *tokenizers],
                     key=lambda line: (line.startswith("from"), line))
    rest = [line for line in lines if line not in packages and line]
    text = [*needs_json, *imports, "", *(line for line in packages if line not in third), "", *rest,
            "", *_inputs(facts, export), "with torch.no_grad():", "    output = model(inputs)", ""]
    if needs_labels:
        text += ['with open("labels.json", encoding="utf-8") as file:',
                 "    labels = json.load(file)"]
    for name, task in facts.tasks.items():
        quoted = _quoted(name)
        picked = facts.portable.pick.format(task=quoted)
        if len(facts.tasks) > 1 and picked == "output.logits":
            picked = f"(output[{quoted}] if {quoted} in output else output.logits)"
        text += _answer(name, task, picked, facts, export)
    return "\n".join(text)


def image_reader(facts: Facts) -> str:
    """The Python that makes an input of an image file, with Pillow: the bits of the training."""
    channels, height, width = facts.shape
    fit = [f"    image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.BILINEAR)"]
    return "\n".join([
        "import torch", "from PIL import Image, ImageOps", "", "",
        "def read_image(file):",
        "    with Image.open(file) as opened:",
        "        image = ImageOps.exif_transpose(opened)",
        '    image = image.convert("RGBA") if image.mode == "P" else image',
        f'    image = image.convert("{"L" if channels == 1 else "RGB"}")',
        *fit * (facts.data["image_size"] is not None),
        "    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)",
        f"    return pixels.view({height}, {width}, {channels}).permute(2, 0, 1).float() / 255",
        "", "",
        '# inputs = torch.stack([read_image("photo.jpg")])',
    ])


def _inputs(facts: Facts, export: Export) -> list[str]:
    """Lines that make ``inputs``."""
    size = ", ".join(map(str, facts.shape))
    if facts.form == "image":
        return ["# Images [batch, channels, height, width] from 0 to 1.",
                f"inputs = torch.rand(2, {size})"]
    if facts.form == "numbers":
        return ["# Numbers in the units of the data.", f"inputs = torch.rand(2, {size})"]
    is_bytes = facts.data["tokenizer"] == "bytes"
    if export.tokenizer is None and not is_bytes:
        low, high = facts.token_range or (0, 0)
        return [f"inputs = torch.randint({low}, {high + 1}, (2, {size}))  # token numbers"]
    lines, numbers = [], 'list("The text.".encode())'
    if export.tokenizer is not None:
        option = ", add_special_tokens=False" if facts.is_language_model else ""
        lines = [f'tokenizer = Tokenizer.from_file("{export.tokenizer}")']
        numbers = f'tokenizer.encode("The text."{option}).ids'
    if facts.is_language_model:
        return [*lines, f"inputs = torch.tensor([{numbers}])"]
    length = facts.shape[0]
    return [*lines, f"tokens = {numbers}[:{length}]",
            f"inputs = torch.tensor([tokens + [{facts.pad_id or 0}] * ({length} - len(tokens))])"]


def _answer(name: str, task: dict, picked: str, facts: Facts, export: Export) -> list[str]:
    """Lines that say what the output of a task means."""
    known = f"labels[{_quoted(name)}]"
    match task["kind"]:
        case "classification":
            return [f"print([{known}[number] for number in {picked}.argmax(1)])"]
        case "multilabel":
            thresholds = task["thresholds"]
            if isinstance(thresholds, list):
                return [f"thresholds = torch.tensor({thresholds})",
                        f"for chosen in {picked}.sigmoid() >= thresholds:",
                        f"    print([label for label, is_on in zip({known}, chosen) if is_on])"]
            return [f"for chosen in {picked}.sigmoid() >= {thresholds}:",
                    f"    print([label for label, is_on in zip({known}, chosen) if is_on])"]
        case "regression":
            return [f"scale = {known}",
                    f"print({picked} * torch.tensor(scale[\"deviation\"]) + "
                    "torch.tensor(scale[\"mean\"]))"]
        case "segmentation":
            what = (f"({picked}[:, 0] > 0).long()" if task["loss"] == "bce" else
                    f"{picked}.argmax(1)")
            return [f"classes = {what}  # of each pixel, by their places in {known}",
                    f"print({known}, classes.unique(return_counts=True))"]
        case _:
            number = f"{picked}[0, -1].argmax().item()"
            if export.tokenizer is not None:
                return [f"print(tokenizer.decode([{number}]))  # the most probable next token"]
            if facts.data["tokenizer"] == "bytes":
                return [f"print(bytes([{number}]))  # the most probable next byte"]
            return [f"print({number})  # the most probable next token"]


def _quoted(name: str) -> str:
    """The name as Python has it, in double quotes."""
    return json.dumps(name, ensure_ascii=False)
