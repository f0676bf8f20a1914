"""The model card of an export: README.md, and what is needed to load the weights elsewhere.

``ModelCard`` (``writer``) gathers what is known when a run starts (``facts``, ``targets``); its
``texts`` makes the files of an export: ``metadata`` the front matter, ``sections`` the text, of
which ``training`` and ``limits`` are parts, ``loading`` the program. ``add_exports`` puts programs
that load other formats into a card that is written already.
"""

from trainlib.card.loading import add_exports
from trainlib.card.writer import ModelCard

__all__ = ["ModelCard", "add_exports"]
