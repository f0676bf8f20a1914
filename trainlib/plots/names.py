"""Names of any length and script, made to fit into a picture and still to be told apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import sha256
from os.path import commonprefix

from matplotlib import font_manager

LENGTH = 22  # letters of a name beside an axis
_FILE_LENGTH = 40  # letters, of up to four bytes each: a file's name has room for 255 bytes
# matplotlib ships these two; what they lack is looked for in the others, where they are installed.
_FONTS = {"sans-serif": "DejaVu Sans", "monospace": "DejaVu Sans Mono"}
_FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Heiti TC", "Hiragino Sans", "Hiragino Sans GB", "Yu Gothic", "MS Gothic",
    "Apple SD Gothic Neo", "Malgun Gothic", "Arial Unicode MS", "Noto Emoji", "Symbola",
)


@cache
def fonts(family: str) -> list[str]:
    """What to write in: a family that is always there, then those that fill its gaps."""
    installed = {font.name for font in font_manager.fontManager.ttflist}  # others cost a warning
    return [_FONTS[family], *(name for name in _FALLBACKS if name in installed)]


@cache
def _letters() -> frozenset[int]:
    return frozenset(
        letter for name in fonts("sans-serif")
        for letter in font_manager.get_font(font_manager.findfont(name)).get_charmap())


def shorten(name: object, length: int = LENGTH) -> str:
    """A name of one line that fits, cut in the middle: names of a kind differ at their ends."""
    name = " ".join(str(name).split())
    tail = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - tail]}…{name[-tail:]}"


def of_classes(names: Sequence[object], length: int = LENGTH) -> list[str]:
    """Short names of classes; with its number in front where one is not enough to tell a class."""
    short = [shorten(name, length) for name in names]
    times = Counter(short)
    return [
        text if times[text] == 1 and all(ord(letter) in _letters() for letter in text)
        else f"{number}: {shorten(name, length - len(str(number)) - 2)}"
        for number, (text, name) in enumerate(zip(short, names, strict=True))
    ]


def tell_apart(names: Iterable[str], length: int) -> list[str]:
    """Short forms, of which two are the same only where the names are."""
    names = list(names)
    whole = list(dict.fromkeys(names))
    short = [shorten(name, length) for name in whole]
    if len(set(short)) < len(short):
        short = [shorten(name, length) for name in _without_what_they_share(whole, length)]
    times = Counter(short)
    short = [text if times[text] == 1 else f"({number}) {shorten(text, length - 5)}"
             for number, text in enumerate(short, 1)]
    return [dict(zip(whole, short, strict=True))[name] for name in names]


def _without_what_they_share(names: list[str], length: int) -> list[str]:
    """Of start and end as much as there is room for beside the middle, in which they differ."""
    start = len(commonprefix(names))
    end = min(len(commonprefix([name[::-1] for name in names])), min(map(len, names)) - start)
    room = max(length - 2 - max(len(name) - start - end for name in names), 0)
    kept = min(room // 2, end)
    before, after = start - min(room - kept, start), end - kept
    return [("…" if before else "") + name[before : len(name) - after] + ("…" if after else "")
            for name in names]


def of_files(names: Iterable[str]) -> dict[str, str]:
    """By name, a part of a file's name that no other has, not even where case does not count."""
    names = list(names)
    plain = {name: re.sub(r"[^\w.-]", "_", name)[:_FILE_LENGTH] for name in names}
    taken: set[str] = set()
    for name in sorted(names, key=lambda name: plain[name] != name):  # a plain name keeps it
        if plain[name].casefold() in taken or len(name) > _FILE_LENGTH:
            plain[name] += "_" + sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        taken.add(plain[name].casefold())
    return plain
