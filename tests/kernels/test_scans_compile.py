"""The Triton kernels of linear attention compile for Ampere and Hopper on a CPU, within the GPU's shared memory and
registers.

By default at one tile an architecture, the model's own; the other pinned tiles are marked `full`.
"""

from collections.abc import Callable

import pytest

from kernels.lightning.tiles import THETA_STRETCH, TILES
from kernels.quantize.noted import SLOTS
from tests.kernels.compiling import SHARED_MEMORY, TYPES, compiled, resources, triton

# Bytes a thread may spill on Hopper, where a tile as measured fastest does not quite fit its registers; none elsewhere.
SPILLED = {(9, 2, 256): 24}
# (capability, bytes, whether dk) -> the same of scans that find theta's gradient too, mostly where stretches meet, at
# a summed width of 128.
SPILLED_CROSSING = {(9, 2, False): 56 if triton.__version__.startswith("3.6.") else 40, (9, 2, True): 24}


def compile_scan(capability: int, element_bytes: int, summed: int, states: bool = False, **constants):
    """The scan, or the pass for its pieces' states, as launched for full widths: by descriptors where there are."""
    from kernels.lightning.triton_scan import scan_kernel
    from kernels.lightning.triton_segments import piece_states_kernel

    tile = TILES[capability][element_bytes][summed]
    described = capability >= 9 and element_bytes == 2
    types = {}
    for name, columns in {"a": summed, "b": summed, "c": tile.out, "out": tile.out}.items():
        if described:
            types[name] = f"tensordesc<{TYPES[element_bytes][1:]}[1, {tile.chunk}, 1, {columns}]>"
        else:
            types[name] = TYPES[element_bytes]
    types |= {f"{name}_pointer": "*fp32" for name in ("decay", "first_state", "last_state", "states", "flow")}
    types |= {f"{name}_pointer": "*i32" for name in ("bounds", "document", "first")}
    types |= dict.fromkeys(("out_pointer", "crossing_pointer"), TYPES[element_bytes])
    kernel = piece_states_kernel if states else scan_kernel
    constants = {"CUT": True} | ({} if states else {"CROSSING": 0, "FROM_ZERO": False}) | constants
    constants |= {"DESCRIPTORS": described, "CHUNK": tile.chunk, "SUMMED": summed, "OUT": tile.out}
    return compiled(
        kernel, capability, types, constants | {"STAGES": tile.stages}, num_warps=tile.warps, num_stages=tile.stages
    )


def tiles(kept: Callable[[int], bool] = lambda summed: True) -> list:
    """(capability, bytes of an element, summed width) of every pinned tile whose width is `kept`; all but bf16 at width
    128 marked `full`."""
    keys = [(c, b, w) for c, table in TILES.items() for b, row in table.items() for w in row if kept(w)]
    return [pytest.param(*key, marks=() if key[1:] == (2, 128) else pytest.mark.full) for key in keys]


SCANS = pytest.mark.parametrize(("capability", "element_bytes", "summed"), tiles())


def check_training_scan(capability: int, element_bytes: int, summed: int, reverse: bool) -> None:
    constants = {"REVERSE": reverse, "RAGGED": False, "PACKED": False, "HAS_FIRST": True, "HAS_LAST": False}
    shared, spilled = resources(compile_scan(capability, element_bytes, summed, **constants))
    assert shared <= SHARED_MEMORY[capability]
    assert spilled <= SPILLED.get((capability, element_bytes, summed), 0)


@SCANS
def test_lightning_scan(capability, element_bytes, summed):
    check_training_scan(capability, element_bytes, summed, reverse=capability == 8)


@pytest.mark.full
@SCANS
def test_lightning_scan_the_other_way(capability, element_bytes, summed):
    check_training_scan(capability, element_bytes, summed, reverse=capability == 9)


@SCANS
def test_lightning_scan_of_documents_with_states(capability, element_bytes, summed):
    """On Hopper loading and storing states may spill, outside the loop; on Ampere two registers, which of two versions
    of Triton one spills, now here, now there."""
    constants = {"REVERSE": False, "RAGGED": True, "PACKED": True, "HAS_FIRST": True, "HAS_LAST": True}
    shared, spilled = resources(compile_scan(capability, element_bytes, summed, **constants))
    assert shared <= SHARED_MEMORY[capability]
    assert spilled <= 8 or capability > 8


@pytest.mark.parametrize(("capability", "element_bytes", "summed"), tiles(lambda summed: summed <= 128))
@pytest.mark.parametrize("reverse", [False, True], ids=["dq", "dk"])
def test_scan_for_the_gradient_of_theta(capability, element_bytes, summed, reverse):
    constants = {"REVERSE": reverse, "RAGGED": False, "PACKED": False, "HAS_FIRST": False, "HAS_LAST": False}
    kernel = compile_scan(capability, element_bytes, summed, CROSSING=THETA_STRETCH, **constants)
    shared, spilled = resources(kernel)
    assert shared <= SHARED_MEMORY[capability]
    allowed = SPILLED_CROSSING.get((capability, element_bytes, reverse), 0) if summed == 128 else 0
    assert spilled <= allowed


def test_stretches_hold_whole_chunks():
    """theta's gradient counts at the boundaries between them, which only chunks' ends can be."""
    tiles = [tile for table in TILES.values() for row in table.values() for tile in row.values()]
    assert all(THETA_STRETCH % tile.chunk == 0 for tile in tiles)


@pytest.mark.parametrize("capability", sorted(TILES))
def test_what_stands_around_the_scan_of_gla(capability):
    """The gate, the feature map and the walk over segments."""
    from kernels.gla import feature_map, triton_features, triton_gate
    from kernels.lightning import triton_segments

    names = ("sum", "dsum", "theta", "states", "given", "last", "decay", "flow", "weight")
    fp32 = {f"{name}_pointer": "*fp32" for name in names}
    integers = dict.fromkeys(("positions_pointer", "bounds_pointer", "first_pointer", "largest_pointer"), "*i32")
    gate = {"GATE": True, "WIDTH": 4096, "SLOTS": SLOTS}
    features = {"ACT": 1, "QUICK": True, "ROWS": feature_map.ROWS, "COLUMNS": feature_map.COLUMNS}
    steps = features | {"STEPS": feature_map.STEPS, "SLOTS": SLOTS}
    without_lrpe = dict.fromkeys(("theta_pointer", "positions_pointer"))
    gates = (triton_gate.gate_kernel, triton_gate.gate_gradient_kernel)
    cases = (
        *((kernel, gate | {"largest_pointer": None}, 8) for kernel in gates),
        *((kernel, gate, 8) for kernel in gates),
        *(
            (triton_features.features_kernel, features | wanted | lrpe, feature_map.WARPS)
            for wanted in ({"QUERIES": q, "KEYS": k} for q, k in ((True, True), (True, False), (False, True)))
            for lrpe in ({}, without_lrpe)
        ),
        *(
            (triton_features.feature_gradients_kernel, steps | absent | noting, feature_map.WARPS)
            for absent in ({}, without_lrpe | dict.fromkeys(("weight_pointer", "flow_pointer")))
            for noting in ({}, {"largest_pointer": None})
        ),
        (triton_segments.combine_kernel, {"REVERSE": True, "PACKED": True, "BLOCK": 1024}, 4),
    )
    for kernel, constants, warps in cases:
        types = {name: "*bf16" for name in kernel.arg_names if name.endswith("pointer")} | fp32 | integers
        types["middle"] = "fp32"
        shared, spilled = resources(compiled(kernel, capability, types, constants, num_warps=warps))
        assert shared <= 48 * 1024, kernel
        assert spilled == 0, (kernel, constants)


@SCANS
def test_lightning_segment_states(capability, element_bytes, summed):
    for packed in (False, True):
        constants = {"REVERSE": True, "RAGGED": packed, "PACKED": packed, "WITH_LAST": packed}
        shared, spilled = resources(compile_scan(capability, element_bytes, summed, states=True, **constants))
        assert shared <= SHARED_MEMORY[capability]
        assert spilled <= SPILLED.get((capability, element_bytes, summed), 0)
