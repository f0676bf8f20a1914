"""What the terminal is told: who says what (``lines``), a bar (``bar``), rows of a table
(``table``), and the latter two of a run (``progress``)."""

from trainlib.terminal.lines import end, listen, log_to, say
from trainlib.terminal.progress import RunProgress

__all__ = ["RunProgress", "end", "listen", "log_to", "say"]
