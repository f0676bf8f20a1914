"""What the terminal is told: who says what (``lines``), a bar (``bar``), rows of a table
(``table``), both of a run (``progress``), and where everything is at its end (``ending``)."""

from trainlib.terminal.ending import ending
from trainlib.terminal.lines import end, listen, log_to, say
from trainlib.terminal.progress import Count, RunProgress

__all__ = ["Count", "RunProgress", "end", "ending", "listen", "log_to", "say"]
