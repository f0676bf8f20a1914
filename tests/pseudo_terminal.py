"""A terminal of so many columns, and what a user sees on it after everything was written."""

import fcntl
import os
import pty
import struct
import termios
import threading
from pathlib import Path

from warm import fork


def run_on_terminal(arguments: list[str], columns: int, **more) -> tuple[int, str]:
    """The exit code of a script, and every letter that its processes wrote to their terminal.

    Args:
        more: of ``fork``.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = bytearray()

    def read() -> None:
        try:
            while piece := os.read(ours, 65536):
                written.extend(piece)
        except OSError:  # Linux's way to say that nobody is left to write
            pass

    reader = threading.Thread(target=read)
    reader.start()
    result = fork(arguments, terminal=Path(os.ttyname(theirs)), **more)
    os.close(theirs)
    reader.join()
    os.close(ours)
    return result.returncode, written.decode()


def screen(written: str, columns: int) -> list[str]:
    """The lines that stand on the terminal, the oldest first, if it never scrolled."""
    lines, column = [[]], 0
    for letter in written:
        if letter == "\r":
            column = 0
        elif letter == "\n":
            lines.append([])
        else:
            if column == columns:
                lines.append([])
                column = 0
            line = lines[-1]
            line += " " * (column + 1 - len(line))
            line[column] = letter
            column += 1
    return ["".join(line).rstrip() for line in lines]
