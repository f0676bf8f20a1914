"""Secrets stay where they are: none is taken as an option, none is written into a file.

The resolved config is a recipe, which people pass on; a secret that was blanked there would make it
another run's recipe. So an option that holds one is refused, and texts that come from elsewhere,
such as errors of libraries, are blanked before they are written.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")  # of snake_case, camelCase, CAPITALS
_SECRET_WORDS = {"token", "secret", "password", "passwd", "passphrase", "pwd", "credential", "jwt",
                 "apikey"}
# A key opens something after these words; a sort_key or label_key does not.
_OF_A_KEY = {"api", "access", "secret", "private", "auth", "account", "signing", "encryption",
             "ssh", "license", "service", "wandb", "admin", "client", "storage"}
_OF_A_VOCABULARY = {"pad", "unk", "sep", "cls", "mask", "bos", "eos", "eot", "start", "end", "stop",
                    "image", "special"}
_URL_LOGIN = re.compile(
    r"(?<=://)[^/?#\s:@'\"]*:[^/?#\s'\"]+(?=@)"
    r"|(?:(?<=http://)|(?<=https://))[^/?#\s@'\"]+(?=@)|(?<=://)[^/?#\s:@'\"]{16,}(?=@)",
    re.IGNORECASE,
)
_URL_QUERY = re.compile(
    r"(?<=[?&#])((?:[\w.-]*[_.-])?(?:key|token|secret|password|signature|sig|auth|pwd|passwd|jwt"
    r"|credential)=|[\w.-]*(?:apikey|accesstoken|accesskeyid)=)([^&\s'\"]+)",
    re.IGNORECASE,
)
_OF_A_PAGE = {"key=", "page_token=", "next_token="}  # unless what follows is long
_LOOKS_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=.-]{20,}", re.ASCII)
_SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]|\s*")  # pad_token: <pad> is a word of a vocabulary
_SHORTEST = 8  # letters; a shorter value of a variable would be found in texts that are none


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)] or [""]


def _is_secret(name: str, text: str) -> bool:
    """Whether an option or variable of this name holds a secret, if this is its value."""
    *before, last = _words(name)
    if last in ("keys", "tokens"):  # of which max_tokens are numbers
        return bool(_OF_A_KEY & set(before))
    last = last.removesuffix("s") if last.removesuffix("s") in _SECRET_WORDS else last
    if last == "token":
        return not _SPECIAL_TOKEN.fullmatch(text) and not (
            _OF_A_VOCABULARY & set(before) and not _LOOKS_RANDOM.fullmatch(text))
    if last == "key":
        return bool(_OF_A_KEY & set(before)) or bool(_LOOKS_RANDOM.fullmatch(text))
    return last in _SECRET_WORDS


def mistakes(options: dict[str, Any]) -> list[str]:
    """A line for each option that holds a secret, none of which repeats it."""
    variables = _secret_variables()
    lines = []
    for path, name, text in _texts(options):
        variable = next((v for v, value in variables.items() if value in text), None)
        if text and _is_secret(name, text):
            what = "by its name a secret"
        elif _URL_LOGIN.search(text) or _has_secret_query(text):
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
    text = _URL_QUERY.sub(r"\1***", _URL_LOGIN.sub("***", text))
    for value in sorted(_secret_variables().values(), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def _has_secret_query(text: str) -> bool:
    return any(name.lower() not in _OF_A_PAGE or len(value) >= 2 * _SHORTEST
               for name, value in _URL_QUERY.findall(text))


def _secret_variables() -> dict[str, str]:
    found = {}
    for name, value in os.environ.items():
        if name in ("PWD", "OLDPWD"):  # folders, maybe of another machine
            continue
        # Any KEY of the environment is one; the name of a file that holds it is not.
        is_named = _words(name)[-1] in _SECRET_WORDS | {"key", "keys"} or _is_secret(name, value)
        if is_named and len(value) >= _SHORTEST and not os.path.exists(value):
            found[name] = value
    return found


def _texts(value: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Each text among nested options, and each number that is as long as a secret: its dotted path,
    the last name on it, and itself."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}" if path else str(key), str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, path, name)
    elif isinstance(value, str):
        yield path, name, value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if len(str(value)) >= _SHORTEST:
            yield path, name, str(value)
