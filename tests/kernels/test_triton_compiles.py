"""Every Triton kernel at every pinned tile compiles for Ampere and Hopper, here where there is neither."""

import pathlib
import re
import subprocess
import tempfile

import pytest

from kernels.lightning.configs import THETA_STRETCH, TILES, tile_for

triton = pytest.importorskip("triton", reason="triton is not installed")

SHARED_MEMORY = {8: 163 * 1024, 9: 227 * 1024}  # bytes a program may use
TYPES = {2: "*bf16", 4: "*fp32"}
# Bytes a thread may spill, where a tile as measured fastest does not quite fit its registers; none elsewhere.
SPILLED = {(9, 2, 256): 24}


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


def compile_scan(capability: int, element_bytes: int, summed: int, states: bool = False, lrpe: str = "", **constants):
    """The scan, or the pass for its pieces' states, as launched for full widths: by descriptors where there are.

    lrpe: "summed" or "out" for that tile in a layer with LRPE, where `summed` is the width before doubling.
    """
    from kernels.lightning.triton_features import ACTIVATIONS
    from kernels.lightning.triton_scan import scan_kernel
    from kernels.lightning.triton_segments import piece_states_kernel

    tile = tile_for(capability, element_bytes, summed, 256 if not lrpe else summed, lrpe or None)
    described = capability >= 9 and element_bytes == 2
    types = {}
    for name, columns in {"a": summed, "b": summed, "c": tile.out, "out": tile.out}.items():
        if described and not (name == "out" and constants.get("PACKED")):
            types[name] = f"tensordesc<{TYPES[element_bytes][1:]}[1, {tile.chunk}, 1, {columns}]>"
        else:
            types[name] = TYPES[element_bytes]
    pointers = ("decay", "first_state", "last_state", "states", "chunk", "flow")
    types |= {f"{name}_pointer": "*fp32" for name in pointers}
    types |= {f"{name}_pointer": "*i32" for name in ("bounds", "document", "first")}
    types |= {"raw": TYPES[element_bytes], "crossing_pointer": TYPES[element_bytes]}
    types["within_pointer"] = "*fp16" if element_bytes == 2 else "*fp32"
    constants = {"FEATURES": 0, "ACT": 0, "LRPE": bool(lrpe), "begin_pointer": None, "CUT": True} | constants
    if lrpe:
        constants |= {"FEATURES": 1 if lrpe == "summed" else 2, "ACT": ACTIVATIONS["silu"]}
    kernel = piece_states_kernel if states else scan_kernel
    if not states:
        constants = {"FLOW": THETA_STRETCH if lrpe == "out" else 0} | constants
    constants |= {"DESCRIPTORS": described, "CHUNK": tile.chunk, "SUMMED": summed, "OUT": tile.out}
    return compiled(
        kernel, capability, types, constants | {"STAGES": tile.stages}, num_warps=tile.warps, num_stages=tile.stages
    )


TILE_KEYS = [(c, b, w) for c, table in TILES.items() for b, tiles in table.items() for w in tiles]


def check_training_scan(capability: int, element_bytes: int, summed: int, reverse: bool) -> None:
    constants = {"REVERSE": reverse, "RAGGED": False, "PACKED": False, "HAS_FIRST": True, "HAS_LAST": False}
    shared, spilled = resources(compile_scan(capability, element_bytes, summed, **constants))
    assert shared <= SHARED_MEMORY[capability]
    assert spilled <= SPILLED.get((capability, element_bytes, summed), 0)


@pytest.mark.parametrize(("capability", "element_bytes", "summed"), TILE_KEYS)
def test_lightning_scan(capability, element_bytes, summed):
    check_training_scan(capability, element_bytes, summed, reverse=capability == 8)


@pytest.mark.full
@pytest.mark.parametrize(("capability", "element_bytes", "summed"), TILE_KEYS)
def test_lightning_scan_the_other_way(capability, element_bytes, summed):
    check_training_scan(capability, element_bytes, summed, reverse=capability == 9)


@pytest.mark.parametrize(("capability", "element_bytes", "summed"), TILE_KEYS)
def test_lightning_scan_of_documents_with_states(capability, element_bytes, summed):
    """Loading and storing states may spill, outside the loop; the shared memory must do."""
    constants = {"REVERSE": False, "RAGGED": True, "PACKED": True, "HAS_FIRST": True, "HAS_LAST": True}
    shared, _ = resources(compile_scan(capability, element_bytes, summed, **constants))
    assert shared <= SHARED_MEMORY[capability]


@pytest.mark.parametrize(("capability", "element_bytes", "summed"), TILE_KEYS)
def test_lightning_segment_states(capability, element_bytes, summed):
    shared, spilled = resources(
        compile_scan(capability, element_bytes, summed, states=True, REVERSE=True, PACKED=False, WITH_LAST=False)
    )
    assert shared <= SHARED_MEMORY[capability]
    assert spilled <= SPILLED.get((capability, element_bytes, summed), 0)


def row_kernels():
    from kernels.norm_gate import triton_norm_gate as gate
    from kernels.srmsnorm import triton_norm as norm

    scale = {"eps": "fp32", "square_sum_pointer": "*fp32", "dsquare_sum_pointer": "*fp32"}
    names = {
        norm: ("forward_kernel", "backward_kernel", "add_forward_kernel", "add_backward_kernel"),
        gate: ("gate_forward_kernel", "gate_backward_kernel", "scale_forward_kernel", "scale_backward_kernel"),
    }
    return [(getattr(module, name), scale) for module, kernels in names.items() for name in kernels]


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("width", [64, 16384])
def test_row_kernels(capability, width):
    from kernels.rows import block_for

    block, warps = block_for(width)
    for kernel, special in row_kernels():
        types = {name: "*bf16" for name in kernel.arg_names if name.endswith("pointer")} | special
        shared, spilled = resources(compiled(kernel, capability, types, {"WIDTH": block}, num_warps=warps))
        assert shared <= 48 * 1024, kernel
        assert spilled == 0, kernel


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("silu", [False, True])
def test_sglu(capability, silu):
    from kernels.sglu import triton_sglu

    for kernel in (triton_sglu.forward_kernel, triton_sglu.backward_kernel):
        types = {name: "*bf16" for name in kernel.arg_names if name.endswith("pointer")}
        constants = {"SILU": silu, "BLOCK": triton_sglu.BLOCK}
        assert resources(compiled(kernel, capability, types, constants, num_warps=triton_sglu.WARPS))[1] == 0
