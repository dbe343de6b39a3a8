"""The README's first screen: the code runs as it stands, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from patchclamp._demo_server import demo_server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE, ANSWER = re.search(r"```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL).groups()  # type: ignore[union-attr]


def test_the_six_lines_print_what_the_readme_says() -> None:
    with demo_server(lambda *_: None) as address:
        code = CODE.replace("localhost:50051", address)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ANSWER, done.stderr


def test_the_snippet_is_six_lines() -> None:
    assert len([line for line in CODE.splitlines() if line]) == 6


def test_every_make_target_it_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_path_it_names_exists() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`(tests/[^`]+)`", README)
    assert linked
    for path in linked:
        assert (ROOT / path).exists(), path
