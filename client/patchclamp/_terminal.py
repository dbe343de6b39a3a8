"""What the commands print: tables, bars and a little colour, within the width of the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from patchclamp._config import colour_wanted

_WIDEST = 100
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Terminal:
    """Where text goes, and what it can show."""

    stream: TextIO
    width: int
    colour: bool
    blocks: bool

    @classmethod
    def of(cls, stream: TextIO) -> Terminal:
        """What a stream can show: colour on a terminal only, block characters where its encoding has them."""
        return cls(
            stream=stream,
            width=min(shutil.get_terminal_size((80, 24)).columns, _WIDEST),
            colour=stream.isatty() and colour_wanted(),
            blocks=(stream.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32"),
        )

    def say(self, text: str = "") -> None:
        """One line, or several."""
        print(text, file=self.stream, flush=True)

    def paragraph(self, text: str) -> None:
        """Prose, wrapped."""
        self.say(textwrap.fill(text, self.width, break_long_words=False, break_on_hyphens=False))

    def items(self, items: Sequence[str]) -> None:
        """Items in a row, two blanks apart; lines break only between them."""
        line = ""
        for item in items:
            if line and len(line) + 2 + len(item) > self.width:
                self.say(line)
                line = ""
            line += f"  {item}"
        self.say(line)

    def bold(self, text: str) -> str:
        return self._painted(text, "1")

    def dim(self, text: str) -> str:
        return self._painted(text, "2")

    def green(self, text: str) -> str:
        return self._painted(text, "32")

    def bar(self, fraction: float, width: int) -> str:
        """A horizontal bar, full at 1."""
        eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
        if not self.blocks:
            return "#" * round(eighths / 8)
        return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")

    def table(self, rows: Sequence[Sequence[str]], header: Sequence[str] = (), *, right: Sequence[int] = ()) -> None:
        """Columns side by side, two blanks apart; `right` are aligned to the right, the last one is wrapped."""
        cells = [header, *rows] if header else list(rows)
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        indent = sum(widths[:-1]) + 2 * len(widths)
        for number, row in enumerate(cells):
            texts = [
                text.rjust(width) if column in right else text.ljust(width)
                for column, (text, width) in enumerate(zip(row[:-1], widths, strict=False))
            ]
            last = row[-1].rjust(widths[-1]) if len(widths) - 1 in right else row[-1]
            lines = textwrap.wrap(last, max(self.width - indent, 20), drop_whitespace=False) or [""]
            line = "  ".join(["", *texts, lines[0]]).rstrip()
            self.say(self.dim(line) if header and number == 0 else line)
            for more in lines[1:]:
                self.say(f"{' ' * indent}{more.strip()}")

    def _painted(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour and text else text
