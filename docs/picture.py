"""Draw what a command prints on a terminal: ``python docs/picture.py docs/run.svg minikd distill --out FOLDER``."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 88


def on_a_terminal(command: list[str]) -> str:
    """What the command writes to standard output when that is a terminal, without progress (standard error)."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "60", "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(writer)
        pieces = []
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            pieces.append(piece)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return b"".join(pieces).decode().replace("\r\n", "\n")


def main() -> None:
    path, *command = sys.argv[1:]
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text(f"$ {' '.join(command[:2])}", style="bold"))
    console.print(Text.from_ansi(on_a_terminal(command)))
    svg = console.export_svg(title=" ".join(command[:2]))
    svg = re.sub(r"@font-face {[^}]*}", "", svg)  # the reader's own monospaced font will do; nothing is fetched
    Path(path).write_text(svg.replace("Fira Code", "DejaVu Sans Mono, Consolas"), "utf-8")


if __name__ == "__main__":
    main()
