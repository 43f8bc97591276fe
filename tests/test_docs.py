"""README.md and CONTRIBUTING.md do not drift: their Python runs, and what their commands name exists.

A block is not run where ``<!-- not-run: reason -->`` stands right before it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "bench/README.md")
FENCE = re.compile(
    r"(?:<!--\s*not-run:\s*(?P<reason>.+?)\s*-->\s*\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    return [
        Block(page, text[: m.start("code")].count("\n"), m["language"], m["code"], m["reason"])
        for m in FENCE.finditer(text)
    ]


BLOCKS = [
    block for page in PAGES if (ROOT / page).exists() for block in blocks_of(page, (ROOT / page).read_text())
]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell", "console", "")]


def test_the_pages_exist() -> None:
    missing = [
        page for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if not (ROOT / page).exists()
    ]
    assert not missing


def test_blocks_are_found() -> None:
    """The parser itself: language, line, and the reason right before a fence, not one further up."""
    text = "x\n```python\na = 1\n```\n<!-- not-run: needs a GPU -->\n```bash\nmake gpu-test\n```\n"
    text += "\n```py\nb\n```\n"
    found = [(b.line, b.language, b.code, b.reason) for b in blocks_of("p", text)]
    assert found == [
        (2, "python", "a = 1\n", None),
        (6, "bash", "make gpu-test\n", "needs a GPU"),
        (10, "py", "b\n", None),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_blocks_run(page: str, tmp_path: Path, run_python) -> None:  # type: ignore[no-untyped-def]
    """All blocks of a page in one process, top to bottom, as a reader would paste them."""
    blocks = [block for block in PYTHON if block.page == page and block.reason is None]
    if not blocks:
        pytest.skip(f"{page}: every block is marked not-run")
    script = "".join(f"\nexec(compile({b.code!r}, {str(b)!r}, 'exec'), globals())\n" for b in blocks)
    result = run_python(script, timeout=600)
    assert result.returncode == 0, f"{page}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


def commands() -> list[tuple[Block, str]]:
    lines = []
    for block in SHELL:
        for line in block.code.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ").split(" #")[0].strip()
            lines += [(block, part.strip()) for part in command.split("&&") if part.strip()]
    return lines


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [(str(b), word) for b, c in commands() if c.startswith("make ") for word in c.split()[1:2]]
    unknown = [
        (where, word) for where, word in named if re.fullmatch(r"[a-z-]+", word) and word not in targets
    ]
    assert not unknown
    documented = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "format", "bench", "gpu-test", "gpu-bench", "clean", "help"} <= documented


def test_lissom_commands_and_options_exist() -> None:
    """Each ``lissom COMMAND --option`` of the docs, against the program's own help."""
    pytest.importorskip("typer", reason="the command line needs lissom[cli]")
    named = {
        (c.split()[1], o) for _, c in commands() if re.match(r"lissom [a-z]", c) for o in [*c.split()[2:], ""]
    }
    helps: dict[str, str] = {}
    wrong = []
    for command, option in sorted(named):
        if command not in helps:
            script = "import sys; sys.argv[0] = 'lissom'; from lissom.cli import main; main()"
            done = subprocess.run(
                [sys.executable, "-c", script, command, "--help"],
                capture_output=True,
                text=True,
                env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
            )
            helps[command] = done.stdout if done.returncode == 0 else ""
        if not helps[command]:
            wrong.append(f"lissom {command}")
        elif option.startswith("--") and option.split("=")[0] not in helps[command]:
            wrong.append(f"lissom {command} {option}")
    assert not wrong


def test_scripts_named_in_commands_exist() -> None:
    missing = []
    for block, command in commands():
        words = command.split()
        if words[0] in ("python", "python3", "pytest", "bash") and block.reason is None:
            paths = [w for w in words[1:] if "/" in w and w.endswith((".py", ".sh")) and "*" not in w]
            missing += [f"{block}: {w}" for w in paths if not (ROOT / w).exists()]
    assert not missing


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        path = ROOT / page
        if not path.exists():
            continue
        text = FENCE.sub("", path.read_text())
        targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
        broken += [f"{page}: {t}" for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not broken


def test_makefile_says_what_it_cannot_do_without_a_gpu() -> None:
    """``make gpu-test`` on a machine without a GPU: one line, not zero. Runs the recipe as it stands."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    # Under `make test` the inner make would take over the outer one's options.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu-check", f"PY={sys.executable}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == [f"no GPU was found by torch {torch.__version__}"]
