"""The floors and walls of the code, held on the import statements themselves.

`check` parses every Python file of `server/` and `client/` below a root and returns what breaks a rule, one sentence
each; the real tree must give none. So that the rules are known to bite, each is also tried on a tiny tree that breaks
it. Two subprocesses then see what importing really does.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Which floor each part of the server stands on; imports run downwards only.
FLOORS = {
    "config": 1,
    "errors": 1,
    "hookpoints": 1,
    "positions": 1,
    "adapters": 2,
    "transcoders": 2,
    "interventions": 3,
    "engine": 4,
    "attribution": 5,
    "patching": 5,
    "analysis": 5,
    "service": 6,
    "__main__": 7,
}
# The ground floor's parts may name each other's errors; otherwise neighbours on a floor know nothing of each other.
SHARED_ON_FLOOR = {1: {"errors"}}
# The bundled model stands apart: it imports nothing of the server, and only the entry point knows it.
APART = "demo"

# What comes in over the wire is seen by one part only. `patchclamp` is the generated package `patchclamp.v1`.
WIRE = {"grpc", "grpc_channelz", "grpc_health", "grpc_reflection", "grpc_status", "google", "patchclamp"}
MAY_IMPORT = {
    "the wire": (WIRE, {"service"}),
    "transformers": ({"transformers"}, {"adapters", APART}),
    "the settings library, which reads the environment": ({"pydantic_settings"}, {"config"}),
}
SDK_MAY_IMPORT = {*sys.stdlib_module_names, "grpc", "google.protobuf", "numpy", "patchclamp"}
READS_ENVIRONMENT = {"server/patchclamp_server/config.py", "client/patchclamp/_config.py"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
MODULE_HOOK = re.compile(r"register_(module_)?(full_)?(forward|backward)_(pre_)?hook")
REGISTERS_HOOKS = "server/patchclamp_server/engine/runner.py"
# Names that say nothing of what a file is about.
EMPTY_NAME = re.compile(r"(.*_)?(utils?|helpers?|managers?)")


@dataclass(frozen=True)
class Import:
    """One module that a file imports, by its full name."""

    module: str
    line: int
    at_import_time: bool


@dataclass(frozen=True)
class Source:
    """One Python file: `path` is relative to the root, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def module(self) -> tuple[str, ...]:
        """The dotted name in parts: `server/patchclamp_server/engine/slots.py` is patchclamp_server, engine, slots."""
        parts = Path(self.path).with_suffix("").parts[1:]
        return parts[:-1] if parts[-1] == "__init__" else parts

    @property
    def in_server(self) -> bool:
        return self.module[0] == "patchclamp_server"

    @property
    def part(self) -> str | None:
        """The part of the server that the file belongs to; None for the server's own `__init__`."""
        return self.module[1] if len(self.module) > 1 else None

    @property
    def generated(self) -> bool:
        return self.module[:2] == ("patchclamp", "v1")

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, at_import_time=True))

    def _imports(self, node: ast.AST, *, at_import_time: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, node.lineno, at_import_time)
            case ast.ImportFrom(names=names):
                origin = self._origin(node)
                for name in names:
                    # `from package import x` may name a module: the longer name says more and is never wrong here.
                    yield Import(f"{origin}.{name.name}" if origin else name.name, node.lineno, at_import_time)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    yield Import(node.args[0].value, node.lineno, at_import_time)
        runs_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            only_for_types = isinstance(node, ast.If) and _is_type_checking(node.test) and child in node.body
            yield from self._imports(child, at_import_time=at_import_time and not runs_later and not only_for_types)

    def _origin(self, node: ast.ImportFrom) -> str:
        """The absolute name of what follows `from`."""
        if node.level == 0:
            return node.module or ""
        is_package = self.path.endswith("/__init__.py")
        package = self.module if is_package else self.module[:-1]
        base = package[: len(package) - (node.level - 1)]
        return ".".join([*base, *([node.module] if node.module else [])])


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def sources(root: Path) -> list[Source]:
    """Every Python file of both sides."""
    return [
        Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for side in ("client/patchclamp", "server/patchclamp_server")
        for path in sorted((root / side).rglob("*.py"))
    ]


def check(root: Path) -> list[str]:
    """What breaks a rule below the root, one sentence each."""
    found: list[str] = []
    for source in sources(root):
        found += names(source)
        if source.generated:
            continue
        found += environment(source)
        found += [*floors(source), *walls(source), *hooks(source)] if source.in_server else sdk(source)
    return found


def floors(source: Source) -> Iterator[str]:
    """Imports run downwards; the demo stands apart."""
    part = source.part
    if part is not None and part != APART and part not in FLOORS:
        yield f"{source.path}: `{part}` stands on no floor"
        return
    for imported in source.imports:
        package, *rest = imported.module.split(".")
        if package != "patchclamp_server" or not rest or rest[0] == part:
            continue
        target, where = rest[0], f"{source.path}:{imported.line}"
        if part is None:
            yield f"{where}: the server's own `__init__` imports `{target}`; it imports nothing of the server"
        elif part == APART:
            yield f"{where}: `{APART}` imports `{target}`; it imports nothing of the server"
        elif target == APART:
            if part != "__main__":
                yield f"{where}: `{part}` imports `{APART}`; only `__main__` may"
        elif target not in FLOORS:
            # A name of the server's `__init__`, such as the version.
            continue
        elif FLOORS[target] > FLOORS[part]:
            yield f"{where}: `{part}` imports upwards: `{target}`"
        elif FLOORS[target] == FLOORS[part] and target not in SHARED_ON_FLOOR.get(FLOORS[part], set()):
            yield f"{where}: `{part}` imports its neighbour `{target}`"


def walls(source: Source) -> Iterator[str]:
    """Some packages are seen by few parts."""
    for imported in source.imports:
        package = imported.module.split(".")[0]
        for what, (packages, parts) in MAY_IMPORT.items():
            if package in packages and source.part not in parts:
                yield f"{source.path}:{imported.line}: imports `{imported.module}`; only {_list(parts)} may see {what}"
        if package == "patchclamp" and not f"{imported.module}.".startswith("patchclamp.v1."):
            yield f"{source.path}:{imported.line}: imports `{imported.module}`; the server shares only `patchclamp.v1`"


def hooks(source: Source) -> Iterator[str]:
    """Only the runner hooks modules; the demo's evaluation is a reference of its own."""
    if source.path == REGISTERS_HOOKS or source.part == APART:
        return
    for node in ast.walk(source.tree):
        match node:
            case ast.Attribute(attr=name) | ast.Constant(value=str() as name) if MODULE_HOOK.fullmatch(name):
                yield f"{source.path}:{node.lineno}: `{name}`; only {REGISTERS_HOOKS} registers module hooks"


def environment(source: Source) -> Iterator[str]:
    """The environment is read in one place on each side."""
    if source.path in READS_ENVIRONMENT:
        return
    named = {f"os.{name}" for name in ENVIRONMENT}
    imported = [(i.line, i.module) for i in source.imports if i.module in named]
    attributes = [node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    used = [(node.lineno, ast.unparse(node)) for node in attributes if ast.unparse(node) in named]
    for line, name in imported + used:
        yield f"{source.path}:{line}: `{name}`; only {_list(READS_ENVIRONMENT)} read the environment"


def sdk(source: Source) -> Iterator[str]:
    """The base install suffices to import the SDK, and nothing in it knows the server."""
    for imported in source.imports:
        where, module = f"{source.path}:{imported.line}", imported.module
        if module.split(".")[0] == "patchclamp_server":
            yield f"{where}: the SDK imports the server: `{module}`"
        elif imported.at_import_time and not any(f"{module}.".startswith(f"{may}.") for may in SDK_MAY_IMPORT):
            yield f"{where}: `{module}` at import time; the base install lacks it"


def names(source: Source) -> Iterator[str]:
    """A file is a concept of the field."""
    for part in source.module:
        if EMPTY_NAME.fullmatch(part):
            yield f"{source.path}: `{part}` names no concept"


def _list(items: set[str]) -> str:
    return " and ".join(sorted(items))


def test_tree_keeps_floors_and_walls() -> None:
    assert check(ROOT) == []


def test_tree_is_found() -> None:
    assert any(source.in_server for source in sources(ROOT))
    assert any(not source.in_server for source in sources(ROOT))


SERVER = "server/patchclamp_server"
SDK = "client/patchclamp"


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        (f"{SERVER}/hookpoints.py", "from patchclamp_server.engine import runner", "imports upwards: `engine`"),
        (f"{SERVER}/hookpoints.py", "from . import engine", "imports upwards: `engine`"),
        (f"{SERVER}/adapters/probe.py", "from ..engine.runner import Runner", "imports upwards: `engine`"),
        (f"{SERVER}/adapters/__init__.py", "from .. import engine", "imports upwards: `engine`"),
        (f"{SERVER}/engine/runner.py", "import patchclamp_server.service.wire", "imports upwards: `service`"),
        (f"{SERVER}/engine/runner.py", "def f():\n    import patchclamp_server.service", "imports upwards"),
        (f"{SERVER}/engine/runner.py", "if TYPE_CHECKING:\n    import patchclamp_server.service", "imports upwards"),
        (f"{SERVER}/engine/runner.py", "import_module('patchclamp_server.service')", "imports upwards"),
        (f"{SERVER}/service/wire.py", "from patchclamp_server import __main__", "imports upwards: `__main__`"),
        (f"{SERVER}/adapters/probe.py", "import patchclamp_server.transcoders", "its neighbour `transcoders`"),
        (f"{SERVER}/patching/sweep.py", "from patchclamp_server.attribution import graph", "its neighbour"),
        (f"{SERVER}/config.py", "from patchclamp_server import hookpoints", "its neighbour `hookpoints`"),
        (f"{SERVER}/__init__.py", "from patchclamp_server.config import Config", "imports nothing of the server"),
        (f"{SERVER}/demo/train.py", "from patchclamp_server.errors import Problem", "imports nothing of the server"),
        (f"{SERVER}/service/wire.py", "import patchclamp_server.demo", "only `__main__` may"),
        (f"{SERVER}/plumbing/pipe.py", "", "`plumbing` stands on no floor"),
        (f"{SERVER}/engine/runner.py", "import grpc.aio", "may see the wire"),
        (f"{SERVER}/engine/runner.py", "from google.protobuf import message", "may see the wire"),
        (f"{SERVER}/__main__.py", "from patchclamp.v1 import run_pb2", "may see the wire"),
        (f"{SERVER}/service/wire.py", "import patchclamp", "shares only `patchclamp.v1`"),
        (f"{SERVER}/service/wire.py", "from patchclamp import errors", "shares only `patchclamp.v1`"),
        (f"{SERVER}/engine/runner.py", "from transformers import AutoModel", "may see transformers"),
        (f"{SERVER}/engine/runner.py", "import pydantic_settings", "reads the environment"),
        (f"{SERVER}/adapters/probe.py", "m.register_forward_hook(f)", "only server/patchclamp_server/engine/runner.py"),
        (f"{SERVER}/adapters/probe.py", "getattr(m, 'register_forward_pre_hook')(f)", "registers module hooks"),
        (f"{SERVER}/engine/loop.py", "m.register_full_backward_hook(f)", "registers module hooks"),
        (f"{SERVER}/engine/loop.py", "import os\nx = os.environ['X']", "read the environment"),
        (f"{SERVER}/engine/loop.py", "from os import getenv", "read the environment"),
        (f"{SDK}/_client.py", "import os\nx = os.getenv('X')", "read the environment"),
        (f"{SDK}/_client.py", "import torch", "`torch` at import time"),
        (f"{SDK}/_client.py", "class A:\n    import torch", "`torch` at import time"),
        (f"{SDK}/_client.py", "try:\n    import torch\nexcept ImportError:\n    pass", "`torch` at import time"),
        (f"{SDK}/_client.py", "from google.rpc import status_pb2", "the base install lacks it"),
        (f"{SDK}/_cli.py", "def f():\n    import patchclamp_server", "the SDK imports the server"),
        (f"{SERVER}/engine/tensor_utils.py", "", "`tensor_utils` names no concept"),
        (f"{SERVER}/engine/helpers/rows.py", "", "`helpers` names no concept"),
        (f"{SDK}/_manager.py", "", "`_manager` names no concept"),
    ],
)
def test_each_rule_bites(tmp_path: Path, path: str, text: str, complaint: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    found = check(tmp_path)
    assert any(complaint in sentence for sentence in found), found


def test_what_the_design_allows_passes(tmp_path: Path) -> None:
    tree = {
        f"{SERVER}/__init__.py": "__version__ = '1'",
        f"{SERVER}/__main__.py": "from patchclamp_server import __version__, demo\nfrom . import service, engine",
        f"{SERVER}/config.py": "import os\nimport pydantic_settings\nfrom . import errors\nx = os.environ",
        f"{SERVER}/adapters/probe.py": "import torch, transformers\nfrom patchclamp_server import hookpoints",
        f"{SERVER}/engine/runner.py": "from . import slots\nm.register_forward_hook(f)",
        f"{SERVER}/service/wire.py": "import grpc, google.rpc.status_pb2\nfrom patchclamp.v1 import run_pb2",
        f"{SERVER}/demo/train.py": "import torch, transformers\nfrom .corpus import facts\nm.register_forward_hook(f)",
        f"{SDK}/__init__.py": "from ._client import connect",
        f"{SDK}/_client.py": "import json\nimport grpc.aio\nimport numpy as np\nfrom google.protobuf import message\n"
        "from patchclamp.v1 import run_pb2\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch",
        f"{SDK}/_config.py": "import os\nx = os.environ",
    }
    for path, text in tree.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert check(tmp_path) == []


# Imports the modules named, then prints what that left behind.
PROBE = """
import importlib, json, logging, os, signal, sys, threading
environment, handlers = dict(os.environ), signal.getsignal(signal.SIGTERM)
for name in sys.argv[1:]:
    importlib.import_module(name)
json.dump({
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "threads": threading.active_count(),
    "environment": os.environ != environment,
    "signals": signal.getsignal(signal.SIGTERM) != handlers,
    "logging": bool(logging.getLogger().handlers),
}, sys.stdout)
"""


def traces_of_importing(modules: list[str]) -> dict[str, object]:
    """What importing the modules, in a fresh process, leaves behind beside the modules themselves."""
    found = subprocess.run(
        [sys.executable, "-c", PROBE, *modules],
        env={"PYTHONPATH": f"{ROOT / 'client'}:{ROOT / 'server'}"},
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    assert found.stderr == ""
    traces: dict[str, object] = json.loads(found.stdout)
    return traces


QUIET = {"threads": 1, "environment": False, "signals": False, "logging": False}


def test_importing_the_sdk_needs_no_server_and_no_torch() -> None:
    traces = traces_of_importing(["patchclamp"])
    modules = traces.pop("modules")
    assert isinstance(modules, list)
    assert {"torch", "transformers", "patchclamp_server"}.isdisjoint(modules)
    assert traces == QUIET


def test_the_server_on_the_base_install_says_what_to_install() -> None:
    code = "import sys; sys.modules['pydantic'] = None; from patchclamp_server.__main__ import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'patchclamp[server]'" in done.stderr and "Traceback" not in done.stderr


def test_importing_the_ground_floor_leaves_no_traces() -> None:
    ground = [part for part, floor in FLOORS.items() if floor == 1]
    traces = traces_of_importing([f"patchclamp_server.{part}" for part in ground])
    modules = traces.pop("modules")
    assert isinstance(modules, list)
    assert {"grpc", "google", "transformers", "patchclamp"}.isdisjoint(modules)
    assert traces == QUIET
