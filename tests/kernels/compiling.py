"""Compiling a Triton kernel for a GPU on a CPU, and what the compiled kernel takes of the GPU."""

import pathlib
import re
import subprocess
import tempfile

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

SHARED_MEMORY = {8: 163 * 1024, 9: 227 * 1024}  # bytes a program may use
TYPES = {2: "*bf16", 4: "*fp32"}


def compiled(kernel, capability: int, types: dict[str, str], constants: dict, **options):
    """Compile `kernel`; every argument in neither `types` nor `constants` is a 32-bit integer."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    # As in a launch: Triton notes which pointers and strides are multiples of 16, and loads whole vectors then.
    divisible = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability * 10, 32), options=options)


def resources(kernel) -> tuple[int, int]:
    """Bytes of shared memory a program needs, and bytes a thread keeps in local memory: its spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return kernel.metadata.shared, int(re.search(r"STACK:(\d+)", report)[1])
