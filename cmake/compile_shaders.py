"""Compiles the GLSL shaders to SPIR-V and embeds them in a C++ source file.

Compilers, in this order: a folder of precompiled modules (``--precompiled``), a ``glslc`` that
knows cooperative matrices and bfloat16, the glslang library that the ``slangpy`` wheel carries.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

Compiler = Callable[[str, Path], None]

DTYPES = {"f32": 0, "f16": 1, "bf16": 2}
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"\s*$')
_PROBE = """#version 460
#extension GL_KHR_cooperative_matrix : require
#extension GL_EXT_bfloat16 : require
layout(local_size_x = 32) in;
void main() {}
"""


def flatten(source: Path, root: Path, defines: dict[str, int]) -> str:
    """Inlines ``#include`` (each file once) and puts ``defines`` after ``#version``."""
    seen: set[Path] = set()

    def expand(path: Path) -> list[str]:
        if path in seen:
            return []
        seen.add(path)
        lines: list[str] = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if match := _INCLUDE.match(line):
                lines += ["#line 1", *expand(root / match[1]), f"#line {number + 1}"]
            elif line.startswith("#version"):
                lines += [line, *(f"#define {name} {value}" for name, value in defines.items())]
                lines.append(f"#line {number + 1}")
            else:
                lines.append(line)
        return lines

    return "\n".join(expand(source)) + "\n"


def glslc_compiler(executable: str) -> Compiler:
    """Compiles with Google's ``glslc``; the ``spirv-val`` beside it, if any, validates the result.

    Any other validator may not know the extensions.
    """
    validator = Path(executable).with_name("spirv-val")

    def compile_to(source: str, target: Path) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".comp") as file:
            file.write(source)
            file.flush()
            subprocess.run(
                [executable, "--target-env=vulkan1.3", "-O", "-o", str(target), file.name],
                check=True,
            )
        if validator.exists():
            command = [str(validator), "--target-env", "vulkan1.3", str(target)]
            subprocess.run(command, check=True)

    return compile_to


class _CompileRequest(ctypes.Structure):
    """The request block of the ``glslang_compile_1_2`` entry point of Slang's glslang library."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("source_path", ctypes.c_char_p),
        ("input_begin", ctypes.c_void_p),
        ("input_end", ctypes.c_void_p),
        ("diagnostic", ctypes.c_void_p),
        ("diagnostic_user", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("output_user", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("action", ctypes.c_uint),
        ("optimisation", ctypes.c_uint),
        ("debug_info", ctypes.c_uint),
        ("target_name", ctypes.c_char_p),
        ("spirv_version", ctypes.c_int * 3),
        ("entry_point", ctypes.c_char_p),
    ]


_STAGE_COMPUTE = 6
_OPTIMISE_HIGH = 2


def slang_compiler(library_path: Path) -> Compiler:
    """Compiles with the glslang library of the ``slangpy`` wheel, and validates the result."""
    library = ctypes.CDLL(str(library_path))
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

    def compile_to(source: str, target: Path) -> None:
        spirv, messages = bytearray(), bytearray()
        output = callback(lambda data, size, _: spirv.extend(ctypes.string_at(data, size)))
        diagnostic = callback(lambda data, size, _: messages.extend(ctypes.string_at(data, size)))
        text = source.encode()
        buffer = ctypes.create_string_buffer(text)
        begin = ctypes.addressof(buffer)
        request = _CompileRequest(
            size=ctypes.sizeof(_CompileRequest),
            source_path=target.stem.encode(),
            input_begin=begin,
            input_end=begin + len(text),
            diagnostic=ctypes.cast(diagnostic, ctypes.c_void_p),
            output=ctypes.cast(output, ctypes.c_void_p),
            stage=_STAGE_COMPUTE,
            optimisation=_OPTIMISE_HIGH,
            spirv_version=(1, 6, 0),
            entry_point=b"main",
        )
        if library.glslang_compile_1_2(ctypes.byref(request)) != 0 or not spirv:
            sys.exit(f"{target.stem}: {messages.decode()}")
        words = (ctypes.c_uint32 * (len(spirv) // 4)).from_buffer_copy(spirv)
        library.glslang_validateSPIRV.restype = ctypes.c_bool
        if not library.glslang_validateSPIRV(words, len(words)):
            sys.exit(f"{target.stem}: the SPIR-V that glslang made is not valid")
        target.write_bytes(spirv)

    return compile_to


def find_compiler() -> Compiler:
    """Returns the first compiler that knows the extensions our shaders use."""
    if glslc := shutil.which("glslc"):
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.comp"
            probe.write_text(_PROBE)
            command = [glslc, "--target-env=vulkan1.3", "-o", f"{probe}.spv", str(probe)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return glslc_compiler(glslc)
    if spec := importlib.util.find_spec("slangpy"):
        for folder in spec.submodule_search_locations or []:
            for library in sorted(Path(folder).glob("*slang-glslang-*")):
                return slang_compiler(library)
    sys.exit(
        "No GLSL compiler that knows cooperative matrices and bfloat16 was found. Install the "
        "Python package slangpy or a recent Vulkan SDK, or pass a folder of precompiled SPIR-V "
        "(-DJAX_AAT_SPIRV_DIR=FOLDER)."
    )


def embed(modules: list[Path], target: Path) -> None:
    """Writes a C++ file that holds every module and the table of their names."""
    lines = ['#include "vulkan/shaders.h"', "", "namespace jax_aat {", "namespace {", ""]
    entries = []
    for index, path in enumerate(modules):
        data = path.read_bytes()
        words = [f"0x{int.from_bytes(data[i : i + 4], 'little'):x}" for i in range(0, len(data), 4)]
        lines.append(f"constexpr std::uint32_t kModule{index}[] = {{")
        lines += [",".join(words[i : i + 12]) + "," for i in range(0, len(words), 12)]
        lines.append("};")
        entries.append(f'    {{"{path.name.removesuffix(".spv")}", kModule{index}}},')
    lines += ["", "constexpr ShaderModule kModules[] = {", *entries, "};", ""]
    lines += ["}  // namespace", ""]
    lines += ["std::span<const ShaderModule> EmbeddedShaders() { return kModules; }", ""]
    lines.append("}  // namespace jax_aat")
    target.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Compiles every module that ``modules.toml`` names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shaders", type=Path, required=True, help="folder of the GLSL sources")
    parser.add_argument("--output", type=Path, required=True, help="folder for the .spv files")
    parser.add_argument("--embed", type=Path, help="C++ file to write")
    parser.add_argument("--precompiled", type=Path, help="take .spv files from this folder instead")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    manifest = tomllib.loads((arguments.shaders / "modules.toml").read_text())
    compiler = None if arguments.precompiled else find_compiler()
    modules = []
    for source, settings in manifest.items():
        for dtype in settings["dtypes"]:
            module = arguments.output / f"{source}.{dtype}.spv"
            if compiler is None:
                shutil.copyfile(arguments.precompiled / module.name, module)
            else:
                defines = {"DTYPE": DTYPES[dtype]}
                text = flatten(arguments.shaders / f"{source}.comp", arguments.shaders, defines)
                # Most changes are of few modules.
                flat = module.with_suffix(".glsl")
                if not (module.exists() and flat.exists() and flat.read_text() == text):
                    compiler(text, module)
                    flat.write_text(text)
            modules.append(module)
    if arguments.embed:
        embed(modules, arguments.embed)


if __name__ == "__main__":
    main()
