"""What `import patchclamp` gives, and what it leaves alone."""

import subprocess
import sys
import tomllib
from pathlib import Path

import patchclamp as pc

ROOT = Path(__file__).resolve().parents[2]

EXPORTED = """
ALL GENERATED LAST PROMPT Aborted AbsentSite Activation Activations AlreadyExists AsyncClient AsyncGenerationStream
Axis Baseline Cancelled Capability Client Condition DeadlineExceeded Dims Error FailedPrecondition FieldViolation
GeneratedToken Generation GenerationStream GenerationSummary Handle Handles Internal Intervention
InterventionNeverFired InvalidArgument Limits ModelInfo NotFound Overloaded PermissionDenied QuotaExceeded
QuotaViolation Read Receipt Run RunSpec RunSummary Sample SiteInfo Sites Token Tokens TooLarge TopToken TranscoderSet
Unauthenticated Unavailable Unimplemented __version__ ablate ablate_everywhere add aio at clamp connect decoder
encoder feature freeze knockout mean patch read resample scale set_coordinate unembed when zero
"""


def test_exported_names() -> None:
    assert pc.__all__ == EXPORTED.split()
    for name in pc.__all__:
        assert getattr(pc, name) is not None


def test_nothing_else_is_public() -> None:
    public = {name for name in vars(pc) if not name.startswith("_")}
    # Submodules become attributes when they are imported.
    assert public - set(pc.__all__) <= {"errors", "v1"}


def test_every_exported_class_and_function_says_what_it_is() -> None:
    for name in pc.__all__:
        if callable(getattr(pc, name)):
            assert getattr(pc, name).__doc__, name


def test_errors_are_drawn_at_the_top() -> None:
    drawing = (pc.errors.__doc__ or "").split("\n\n")[1]
    drawn = [line.lstrip("│├└─ ").split()[0] for line in drawing.splitlines()]
    exported = [
        name for name in pc.__all__ if isinstance(getattr(pc, name), type) and issubclass(getattr(pc, name), pc.Error)
    ]
    assert sorted(drawn) == sorted(exported)


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pc.__version__ == project["version"]


def test_importing_needs_neither_torch_nor_the_server_nor_googleapis() -> None:
    code = (
        "import sys, patchclamp, patchclamp._cli, patchclamp._tour\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'patchclamp_server'}))\n"
        "print('google.rpc' in sys.modules, 'grpc_status' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONPATH": str(ROOT / "client")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.split("\n")[:2] == ["[]", "False False"]


def test_typed() -> None:
    assert (ROOT / "client" / "patchclamp" / "py.typed").exists()
