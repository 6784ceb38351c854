"""Every Triton kernel at every pinned tile compiles for Ampere and Hopper, here where there is neither."""

import pytest

from kernels.lightning.configs import TILES

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


def scan(capability: int, element_bytes: int, summed: int, reverse: bool):
    from kernels.lightning.triton_scan import scan_kernel

    tile = TILES[capability][element_bytes][summed]
    pointers = ("a_pointer", "b_pointer", "c_pointer", "out_pointer")
    types = dict.fromkeys(pointers, TYPES[element_bytes])
    types |= {"decay_pointer": "*fp32", "first_state_pointer": "*fp32", "last_state_pointer": "*fp32"}
    types["bounds_pointer"] = "*i32"
    constants = {"REVERSE": reverse, "PACKED": reverse, "HAS_FIRST": True, "HAS_LAST": True, "RAGGED": True}
    constants |= {"CHUNK": tile.chunk, "SUMMED": summed, "OUT": tile.out}
    return compiled(scan_kernel, capability, types, constants, num_warps=tile.warps, num_stages=tile.stages)


TILE_KEYS = [(c, b, w) for c, table in TILES.items() for b, tiles in table.items() for w in tiles]


@pytest.mark.parametrize(("capability", "element_bytes", "summed"), TILE_KEYS)
def test_lightning_scan(capability, element_bytes, summed):
    # Both directions and layouts over the two architectures; all of them in the full run.
    kernel = scan(capability, element_bytes, summed, reverse=capability == 8)
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]


@pytest.mark.full
@pytest.mark.parametrize(("capability", "element_bytes", "summed"), TILE_KEYS)
def test_lightning_scan_the_other_way(capability, element_bytes, summed):
    kernel = scan(capability, element_bytes, summed, reverse=capability == 9)
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("width", [64, 16384])
def test_srmsnorm(capability, width):
    from kernels.srmsnorm.triton_norm import backward_kernel, block_for, forward_kernel

    block, warps = block_for(width)
    for kernel in (forward_kernel, backward_kernel):
        types = {name: "*bf16" for name in kernel.arg_names if name.endswith("pointer")} | {"eps": "fp32"}
        assert compiled(kernel, capability, types, {"WIDTH": block}, num_warps=warps).metadata.shared <= 48 * 1024
