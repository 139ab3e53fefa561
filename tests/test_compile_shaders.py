"""What `cmake/compile_shaders.py` does with a compiler other than that of the tests."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cmake/compile_shaders.py"


def program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_what_glslc_makes_is_validated_by_the_validator_beside_it(tmp_path):
    spec = importlib.util.spec_from_file_location("compile_shaders", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    # glslc --target-env=... -O -o TARGET SOURCE
    program(tmp_path / "glslc", 'cp "$5" "$4"')
    compile_to = script.glslc_compiler(str(tmp_path / "glslc"))
    compile_to("alone", tmp_path / "module.spv")
    assert (tmp_path / "module.spv").read_text() == "alone"

    validating = tmp_path / "spirv-val"
    program(validating, 'grep -q good "$3"')
    compile_to = script.glslc_compiler(str(tmp_path / "glslc"))
    compile_to("good", tmp_path / "module.spv")
    with pytest.raises(subprocess.CalledProcessError, match="spirv-val"):
        compile_to("bad", tmp_path / "module.spv")
