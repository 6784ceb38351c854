"""Every Triton kernel but those of linear attention (test_scans_compile.py) compiles for Ampere and Hopper on a CPU,
within the GPU's shared memory and registers."""

import pytest

from kernels.lightning.tiles import TILES
from kernels.quantize.noted import SLOTS
from tests.kernels.compiling import SHARED_MEMORY, compiled, resources


def row_kernels():
    """Each with its constants: an absent tensor is one."""
    from kernels.quantize import triton_quantize as quantize
    from kernels.srmsnorm import triton_norm as norm

    unscaled = dict.fromkeys(("r_pointer", "square_sum_pointer", "dr_pointer", "dsquare_sum_pointer"))
    alone = unscaled | dict.fromkeys(("dsum_pointer", "largest_pointer"))
    return [
        (norm.forward_kernel, dict.fromkeys(("r_pointer", "square_sum_pointer", "sum_pointer"))),
        (norm.forward_kernel, {"square_sum_pointer": None}),
        (norm.forward_kernel, {}),
        (norm.backward_kernel, {"SLOTS": SLOTS} | alone),
        (norm.backward_kernel, {"SLOTS": SLOTS} | unscaled),
        (norm.backward_kernel, {"SLOTS": SLOTS}),
        (norm.backward_kernel, {"SLOTS": SLOTS, "largest_pointer": None}),
        (quantize.note_rows_kernel, {"SLOTS": SLOTS}),
    ]


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("width", [pytest.param(64, marks=pytest.mark.full), 16384])
def test_row_kernels(capability, width):
    from kernels.rows import block_for

    block, warps = block_for(width)
    fp32 = {"eps": "fp32", "square_sum_pointer": "*fp32", "dsquare_sum_pointer": "*fp32", "largest_pointer": "*i32"}
    for kernel, constants in row_kernels():
        types = {name: "*bf16" for name in kernel.arg_names if name.endswith("pointer")} | fp32
        types = {name: type_ for name, type_ in types.items() if name not in constants}
        constants = constants | {"WIDTH": block}
        shared, spilled = resources(compiled(kernel, capability, types, constants, num_warps=warps))
        assert shared <= 48 * 1024, kernel
        assert spilled == 0, kernel


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("act", [pytest.param("none", marks=pytest.mark.full), "silu"])
def test_sglu(capability, act):
    from kernels.activations.triton_activations import ACTIVATIONS
    from kernels.sglu import triton_sglu

    for kernel in (triton_sglu.forward_kernel, triton_sglu.backward_kernel):
        types = {name: "*bf16" for name in kernel.arg_names if name.endswith("pointer")} | {"largest_pointer": "*i32"}
        constants = {"ACT": ACTIVATIONS[act], "BLOCK": triton_sglu.BLOCK, "SLOTS": triton_sglu.SLOTS}
        assert resources(compiled(kernel, capability, types, constants, num_warps=triton_sglu.WARPS))[1] == 0


@pytest.mark.parametrize("capability", sorted(TILES))
def test_embedding(capability):
    from kernels.embedding import triton_embedding

    types = {"ids_pointer": "*i64", "weight_pointer": "*bf16", "y_pointer": "*bf16", "scale": "fp32"}
    constants = {"BLOCK": triton_embedding.BLOCK}
    kernel = compiled(triton_embedding.forward_kernel, capability, types, constants, num_warps=triton_embedding.WARPS)
    assert resources(kernel)[1] == 0
    types = {"sum_pointer": "*fp32", "dy_pointer": "*bf16", "rows_pointer": "*i64", "order_pointer": "*i64"}
    constants = {"BLOCK_T": triton_embedding.ADD_TOKENS, "BLOCK_D": triton_embedding.ADD_COLUMNS}
    kernel = compiled(triton_embedding.add_kernel, capability, types | {"scale": "fp32"}, constants, num_warps=4)
    assert resources(kernel)[1] == 0


@pytest.mark.parametrize("capability", sorted(TILES))
def test_rmsnorm(capability):
    from kernels.rmsnorm import triton_rmsnorm as norm
    from kernels.rows import block_for

    for kernel in (norm.forward_kernel, norm.backward_kernel):
        types = {name: "*bf16" for name in kernel.arg_names if name.endswith("_pointer")} | {"eps": "fp32"}
        if "parts_pointer" in types:
            types["parts_pointer"] = "*fp32"
        for width in (2048, 4096):
            block, warps = block_for(width)
            assert resources(compiled(kernel, capability, types, {"WIDTH": block}, num_warps=warps))[1] == 0


@pytest.mark.parametrize("capability", sorted(TILES))
def test_rope(capability):
    from kernels.rope import triton_rope

    types = dict.fromkeys(("q_pointer", "k_pointer", "rotated_q_pointer", "rotated_k_pointer"), "*bf16")
    types |= {"positions_pointer": "*i64", "fractions_pointer": "*i64"}
    constants = {"BACK": True, "QUICK": True, "HEADS": 16, "HALF": 64}
    assert resources(compiled(triton_rope.rope_kernel, capability, types, constants, num_warps=4))[1] == 0


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("with_lrpe", [pytest.param(False, marks=pytest.mark.full), True], ids=["plain", "lrpe"])
def test_decoding_step(capability, with_lrpe):
    from kernels.gla import triton_buffered, triton_step

    types = dict.fromkeys(("x_pointer", "theta_pointer", "y_pointer"), "*bf16") | {"positions_pointer": "*i64"}
    types |= dict.fromkeys(("decay_pointer", "state_pointer", "new_state_pointer", "sums_pointer"), "*fp32")
    constants = {"ACT": 1, "QUICK": True, "GATE": True, "SUMMED": 256 if with_lrpe else 128, "SLICE": triton_step.SLICE}
    constants["DEPENDENT"] = capability >= 9
    if not with_lrpe:
        constants |= {"theta_pointer": None, "positions_pointer": None}
        types = {name: type_ for name, type_ in types.items() if name not in constants}
    kernel = compiled(triton_step.step_kernel, capability, types, constants, num_warps=triton_step.WARPS)
    assert resources(kernel)[1] == 0
    types = {name: type_ for name, type_ in types.items() if not name.startswith("new")}
    types |= dict.fromkeys(("keys_pointer", "values_pointer"), "*bf16")
    types |= dict.fromkeys(("slot_pointer", "start_pointer"), "*i64")
    del constants["SUMMED"], constants["SLICE"]
    for fold, tile in triton_buffered.TILES[capability].items():
        own = constants | triton_buffered.constants(tile, 128, 16) | {"FOLD": fold}
        kernel = compiled(triton_buffered.buffered_step_kernel, capability, types, own, num_warps=tile.warps)
        assert resources(kernel)[1] == 0


@pytest.mark.parametrize(("capability", "weight"), [(8, "bf16"), (9, "bf16"), (9, "fp8e4nv")])
@pytest.mark.parametrize("gated", [False, True], ids=["linear", "glu"])
def test_token_products(capability, weight, gated):
    from kernels.activations.triton_activations import ACTIVATIONS
    from kernels.token import triton_token

    types = {f"{name}_pointer": "*bf16" for name in ("x", "residual", "y")}
    types |= {f"{name}_pointer": f"*{weight}" for name in ("weight", "value")}
    types |= {f"{name}_pointer": "*fp32" for name in ("square_sum", "weight_scale", "value_scale")} | {"eps": "fp32"}
    absent = ("square_sum_pointer", "residual_pointer") if gated else ("value_pointer",)
    if weight == "bf16":
        absent += ("weight_scale_pointer", "value_scale_pointer")
    elif not gated:
        absent += ("value_scale_pointer",)
    types = {name: type_ for name, type_ in types.items() if name not in absent}
    constants = {
        "NORM": True,
        "ACT": ACTIVATIONS["silu" if gated else "none"],
        "PARTS": 64,
        "DEPENDENT": capability >= 9,
    } | dict.fromkeys(absent)
    out = triton_token.TILE_BYTES // 2048 // (2 if weight == "bf16" else 1)
    constants |= {"OUT": out // 2 if gated else out, "WIDTH": 2048, "PIECES": 1}
    if weight != "bf16" and not gated:  # 7B's widest
        constants |= {"OUT": triton_token.FLOAT8_BYTES // triton_token.FLOAT8_PIECE, "PIECES": 6}
    kernel = compiled(triton_token.token_kernel, capability, types, constants, num_warps=triton_token.WARPS)
    assert resources(kernel)[1] == 0


def test_products_of_weights_in_fp8():
    """On Hopper; Ampere has no conversion of e4m3, which `float8_linear.op.obstacle` says."""
    from kernels.float8_linear import triton_float8

    types = {"x_pointer": "*bf16", "data_pointer": "*fp8e4nv", "y_pointer": "*fp32"}
    for rows, tile in triton_float8.TILES.items():
        constants = {"scale_pointer": None, "OUT": tile.out, "ROWS": rows, "DEPTH": tile.depth}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        shared, spilled = resources(compiled(triton_float8.linear_kernel, 9, types, constants, **options))
        assert shared <= SHARED_MEMORY[9]
        assert spilled == 0


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("penalty", [False, True], ids=["plain", "penalty"])
def test_sampling(capability, penalty):
    from kernels.sampling import triton_sampling

    types = dict.fromkeys(("top_k_pointer", "keys_pointer", "positions_pointer", "chosen_pointer"), "*i64")
    types |= dict.fromkeys(("temperature_pointer", "top_p_pointer"), "*fp64")
    types |= {"logits_pointer": "*fp32" if penalty else "*bf16"}
    constants = {"PENALTY": penalty, "BITS": 32 if penalty else 16}
    constants |= {"BLOCK": triton_sampling.BLOCK, "UNROLL": triton_sampling.UNROLL}
    if penalty:
        types |= {"seen_pointer": "*u8", "penalty_pointer": "*fp32"}
    else:
        constants |= {"seen_pointer": None, "penalty_pointer": None}
    kernel = compiled(triton_sampling.sample_kernel, capability, types, constants, num_warps=triton_sampling.WARPS)
    assert resources(kernel)[1] == 0


@pytest.mark.parametrize("capability", sorted(TILES))
def test_cross_entropy(capability):
    from kernels.cross_entropy import triton_exponentials, triton_gradient
    from kernels.cross_entropy.tiles import TILES as HEAD_TILES

    tile = HEAD_TILES[capability]
    blocks = {
        "hidden": (tile.tokens, tile.depth),
        "weight": (tile.vocabulary, tile.depth),
        "out": (tile.tokens, tile.vocabulary),
    }
    described = capability >= 9
    for kernel in (triton_exponentials.exponentials_kernel, triton_exponentials.repair_kernel):
        types = {name: f"tensordesc<bf16[{r}, {c}]>" if described else "*bf16" for name, (r, c) in blocks.items()}
        types |= dict.fromkeys(("reference_pointer", "highest_pointer", "sums_pointer"), "*fp32") | {"limit": "fp32"}
        constants = {"BLOCK_T": tile.tokens, "BLOCK_V": tile.vocabulary, "BLOCK_D": tile.depth}
        constants |= {"DESCRIPTORS": described, "STAGES": tile.stages, "PERSISTENT": tile.persistent}
        types, constants = ({n: v for n, v in d.items() if n in kernel.arg_names} for d in (types, constants))
        shared, spilled = resources(
            compiled(kernel, capability, types, constants, num_warps=tile.warps, num_stages=tile.stages)
        )
        assert shared <= SHARED_MEMORY[capability]
        assert spilled == 0
    types = dict.fromkeys(("hidden_pointer", "weight_pointer", "exponentials_pointer", "scaled_pointer"), "*bf16")
    types |= {"target_row_pointer": "*i64", "has_loss_pointer": "*i1", "limit": "fp32"}
    for kernel, constants in (
        (triton_exponentials.reference_kernel, {"BLOCK": 1024}),
        (triton_exponentials.totals_kernel, {"BLOCK": 64, "BLOCK_T": 32}),
        (triton_gradient.gradient_kernel, {"BLOCK": 1024}),
        (triton_gradient.scale_kernel, {"BLOCK": triton_gradient.SCALE_BLOCK, "HAS_SCALES": True}),
    ):
        found = {n: types.get(n, "*fp32") for n in kernel.arg_names if n.endswith("pointer") or n in types}
        assert resources(compiled(kernel, capability, found, constants, num_warps=4))[1] == 0


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize(
    ("added", "transposed"), [(True, False), *(pytest.param(False, t, marks=pytest.mark.full) for t in (False, True))]
)
def test_symmetric_products(capability, added, transposed):
    from kernels.newton_schulz import triton_symmetric as own

    types = dict.fromkeys(("x", "y", "added", "out", "mirrored"), "*fp16") | {"alpha": "fp32", "share": "fp32"}
    tile = own.TILES[capability]
    if capability >= own.HOPPER:
        square = [tile.rows, tile.columns]
        blocks = {"x": [tile.rows, tile.depth], "y": [tile.depth, tile.columns]}
        if transposed:  # X of a tall matrix is stored as X^T; of others, Y = X^T as X
            blocks["x"].reverse()
        elif not added:
            blocks["y"].reverse()
        blocks |= {"added": square, "out": square, "mirrored": square[::-1]}
        types |= {name: f"tensordesc<fp16{[1, *block]}>" for name, block in blocks.items()}
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    constants |= {"DESCRIPTORS": capability >= own.HOPPER, "X_TRANSPOSED": transposed}
    constants |= {"Y_TRANSPOSED": not transposed and not added}
    constants |= {"x_row" if transposed else "x_column": 1}
    if not added:
        constants["added"] = None
        del types["added"]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel = compiled(own.symmetric_kernel, capability, types, constants, **options)
    shared, spilled = resources(kernel)
    assert shared <= SHARED_MEMORY[capability]
    assert spilled == 0


@pytest.mark.parametrize("capability", sorted(TILES))
def test_muon(capability):
    from kernels.muon import triton_muon

    types = dict.fromkeys(("master_pointer", "momentum_pointer", "gradient_pointer", "divisor_pointer"), "*fp32")
    types |= dict.fromkeys(("out_pointer", "update_pointer", "copy_pointer"), "*bf16")
    types |= dict.fromkeys(("beta", "left", "kept", "step_size"), "fp32") | {"elements": "i64"}
    for kernel in (triton_muon.direction_kernel, triton_muon.apply_kernel):
        constants = {name: value for name, value in vars(triton_muon).items() if name in kernel.arg_names}
        constants |= {"HAS_COPY": True} if "HAS_COPY" in kernel.arg_names else {}
        given = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        assert resources(compiled(kernel, capability, given, constants, num_warps=triton_muon.WARPS))[1] == 0


@pytest.mark.parametrize("capability", sorted(TILES))
@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.full)])
def test_adamw(capability, plain):
    from kernels.adamw import triton_adamw

    names = ("master", "gradient", "first", "second", "divisor")
    types = {f"{name}_pointer": "*fp32" for name in names} | {"copy_pointer": "*bf16", "elements": "i64"}
    floats = ("kept", "step_size", "first_left", "second_left", "second_correction", "eps")
    types |= dict.fromkeys(floats, "fp32")
    constants = {"HAS_COPY": not plain, "HAS_DIVISOR": not plain, "BLOCK": triton_adamw.BLOCK}
    kernel = compiled(triton_adamw.update_kernel, capability, types, constants, num_warps=triton_adamw.WARPS)
    assert resources(kernel)[1] == 0


def test_quantize():
    """On Hopper; Ampere has no fp8. Loads and stores of 16 bytes a thread."""
    from kernels.quantize import triton_many as many
    from kernels.quantize import triton_quantize as quantize
    from kernels.quantize.many import SLOTS as MANY_SLOTS

    pointers = {"x_pointer": "*bf16", "largest_pointer": "*i32", "scale_pointer": "*fp32"}
    tile = {"ROWS": quantize.ROWS, "COLUMNS": quantize.COLUMNS}
    outputs = dict.fromkeys(("rows_pointer", "transposed_pointer"), "*fp8e4nv")
    constants = tile | {"SHIFT": 8, "MOST": 448.0, "PARTIAL": quantize.PROGRAMS}
    tables = {"table_pointer": "*i64", "matrix_pointer": "*i64", "data_pointer": "*fp8e4nv"}
    slots = {"FIELDS": many.FIELDS, "SLOTS": MANY_SLOTS}
    both = slots | tile | {"SHIFT": 8, "MOST": 448.0, "SCALE_STRIDE": 4}
    cases = (
        (quantize.largest_kernel, pointers, {"BLOCK": quantize.BLOCK}),
        (quantize.quantize_kernel, pointers | outputs, constants),
        (quantize.transpose_kernel, dict.fromkeys(outputs, "*u8"), tile),
        (many.many_largest_kernel, pointers | tables, slots | {"BLOCK": quantize.ROWS * quantize.COLUMNS}),
        (many.many_quantize_kernel, pointers | tables, both | {"TRANSPOSED": True}),
        (many.many_quantize_kernel, pointers | tables, both | {"TRANSPOSED": False}),
    )
    for kernel, types, constants in cases:
        types = {name: type_ for name, type_ in types.items() if name in kernel.arg_names}
        built = compiled(kernel, 9, types, constants, num_warps=quantize.WARPS)
        assert resources(built)[1] == 0
        assert "ld.global.v4" in built.asm["ptx"]
        assert kernel in (quantize.largest_kernel, many.many_largest_kernel) or "st.global.v4" in built.asm["ptx"]
