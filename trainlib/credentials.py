"""Secrets stay where they are: none is taken as an option, none is written into a file.

The resolved config is a recipe, which people pass on; a secret that was blanked there would make it
another run's recipe. So an option that holds one is refused, and texts that come from elsewhere,
such as errors of libraries, are blanked before they are written.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

_SECRET_NAME = re.compile(r"(?:^(?:token|secret|password)|[_-](?:key|token|secret|password))$",
                          re.IGNORECASE)
_URL_LOGIN = re.compile(
    r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)|(?:(?<=http://)|(?<=https://))[^/\s@'\"]+(?=@)"
)
_URL_QUERY = re.compile(
    r"(?<=[?&])((?:[\w.-]*[_.-])?(?:key|token|secret|password|signature)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]")  # pad_token: <pad> is a word of a vocabulary
_SHORTEST = 8  # letters; a shorter value of a variable would be found in texts that are none


def mistakes(options: dict[str, Any]) -> list[str]:
    """A line for each option that holds a secret, none of which repeats it."""
    variables = _secret_variables()
    lines = []
    for path, name, text in _texts(options):
        variable = next((v for v, value in variables.items() if value in text), None)
        if _SECRET_NAME.search(name) and text and not _SPECIAL_TOKEN.fullmatch(text):
            what = "by its name a secret"
        elif _URL_LOGIN.search(text) or _URL_QUERY.search(text):
            what = "a URL with credentials in it"
        elif variable is not None:
            what = f"it holds the value of ${variable}"
        else:
            continue
        lines.append(f"{path}: {what}, which config.yaml would pass on; leave it out, and let the "
                     "environment or ~/.netrc hold it, or fetch the data first and name the file")
    return lines


def redact(text: str) -> str:
    """The text with ``***`` for credentials in URLs and for the values of secret variables."""
    for value in sorted(_secret_variables().values(), key=len, reverse=True):
        text = text.replace(value, "***")
    return _URL_QUERY.sub(r"\1***", _URL_LOGIN.sub("***", text))


def _secret_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items()
            if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}


def _texts(value: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Each text among nested options: its dotted path, the last name on it, and itself."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key), str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, path, name)
    elif isinstance(value, str):
        yield path, name, value
