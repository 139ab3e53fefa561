"""Every Python block of the pages and of the README is run, and what it promises to print checked.

The blocks of a page run in order, in one namespace. A block whose first line is ``# not run: ...``
is left out, for one of the reasons below. ``# prints: ...`` after a statement is a promise: the
block must print these lines and no others; in them ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

import jax_aat

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "sh", "text", "toml", "glsl", "cpp"}
REASONS_NOT_TO_RUN = {"needs a GPU"}

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$", re.M | re.S)
_NOT_RUN = re.compile(r"^# not run: (?P<reason>.*)\n")
_PROMISE = re.compile(r"^ *# prints: ?(.*)$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
      language: What follows the opening fence.
      code: Its text.
      line: The line of the page on which `code` starts.
    """

    language: str
    code: str
    line: int

    @property
    def not_run(self) -> str | None:
        """Why it is not run; None: it is."""
        found = _NOT_RUN.match(self.code)
        return found and found["reason"]


def blocks_of(text: str) -> list[Block]:
    found = []
    for fence in _FENCE.finditer(text):
        code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.M)
        line = text.count("\n", 0, fence.start("code")) + 1
        found.append(Block(fence["language"].strip(), code, line))
    return found


def run_blocks(text: str, file: str) -> None:
    """Runs the Python blocks of a page.

    Raises:
      AssertionError: A block printed something else than it promises.
    """
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks_of(text):
        if block.language != "python" or block.not_run:
            continue
        # Errors then name the page and its line.
        compiled = compile("\n" * (block.line - 1) + block.code, file, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
        if promised := "".join(f"{line}\n" for line in _PROMISE.findall(block.code)):
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            got = printed.getvalue()
            kept = doctest.OutputChecker().check_output(promised, got, options)
            assert kept, f"{file}:{block.line} promises to print\n{promised}and prints\n{got}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_and_print_what_they_promise(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem == "sharding" and len(jax.devices()) < 4:
        pytest.skip("its mesh is of four devices")
    monkeypatch.chdir(tmp_path)
    run_blocks(page.read_text(), str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_escapes(page: Path) -> None:
    """Every fence says what it holds, and what is not run says why, in words that are allowed."""
    text = page.read_text()
    blocks = blocks_of(text)
    assert text.count("```") == 2 * len(blocks)
    assert {block.language for block in blocks} <= LANGUAGES
    assert {block.not_run for block in blocks} - {None} <= REASONS_NOT_TO_RUN


def test_blocks_share_a_namespace_and_keep_promises() -> None:
    page = "```python\nx = 2\n```\nthen\n```python\nprint(x, 0.125)\n# prints: 2 0.1...\n```\n"
    run_blocks(page, "page")
    with pytest.raises(AssertionError, match="page:6 promises"):
        run_blocks(page.replace("x = 2", "x = 3"), "page")
    with pytest.raises(NameError):
        run_blocks("```python\n# not run: needs a GPU\nx = 1\n```\n```python\nx\n```\n", "page")


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: jax_aat\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(listed) == sorted(jax_aat.__all__)
