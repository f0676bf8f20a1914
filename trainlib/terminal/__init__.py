"""What the terminal is told: a bar (``bar``), rows of a table (``table``), and both of a run
(``progress``)."""

from trainlib.terminal.progress import RunProgress

__all__ = ["RunProgress"]
