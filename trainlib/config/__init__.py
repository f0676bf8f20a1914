"""One typed, strict mapping: defaults < recipes < flags.

Every module declares the options it reads as an ``Options`` class; the sentence under a field is
its documentation, in ``--help`` and nowhere else (``options``). Recipes and flags are merged as
plain mappings (``recipes``), validated once, and all mistakes are reported together
(``command_line``). Nothing here knows an option by name.
"""

from trainlib.config.command_line import help_text, is_first_process, read, recipe_name
from trainlib.config.options import Options, UserError, describe_options, nearest, one_of
from trainlib.config.recipes import flatten, merge, parse_yaml, to_yaml

__all__ = [
    "Options", "UserError", "describe_options", "flatten", "help_text", "is_first_process",
    "merge", "nearest", "one_of", "parse_yaml", "read", "recipe_name", "to_yaml",
]
