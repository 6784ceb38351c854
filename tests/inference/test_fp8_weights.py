"""Weights kept in fp8: every way to decode gives what the numbers that they stand for give."""

import pytest
import torch

from kernels.float8_linear.reference import dequantized
from megatron_tn.config import ConfigError, ScoreConfig
from megatron_tn.evaluation.perplexity import Documents, evaluate_documents
from megatron_tn.inference import Generator, Prefix, Request, Sampler, Session, generate, keep_in_fp8
from megatron_tn.loading import load_any_model
from megatron_tn.model.base import Model
from megatron_tn.parallel import fp8_weights
from megatron_tn.parallel.linear import SplitLinear
from megatron_tn.planning.live import LiveMemory
from megatron_tn.released.to_checkpoint import write_checkpoint
from megatron_tn.released.weights import ReleasedWeights
from megatron_tn.released.write import save_pretrained
from megatron_tn.score import checked
from tests.helpers.decoding import plain, prompts, recorded_logits, sequences, trained_model
from tests.helpers.models import HYBRID, TRANSFORMER, reference_model
from tests.helpers.shards import make_text_shards

GREEDY = Sampler(temperature=0)
COUNT = 9


def emulated(model: Model) -> Model:
    """`model`, kept in fp8, with its weights as numbers of its own type."""
    state = model.state_dict()
    for name in [name for name in state if name.endswith("_scale")]:
        weight = name.removesuffix("_scale")
        state[weight] = dequantized(state[weight], state.pop(name), torch.float32)
    return loaded(model, state)


def loaded(model: Model, state: dict[str, torch.Tensor]) -> Model:
    other = reference_model(model.config, seed=0, dtype=torch.float32)
    other.load_state_dict(state)
    return other


@pytest.fixture(scope="module")
def trained() -> Model:
    return trained_model()


@pytest.fixture(scope="module")
def kept(trained) -> Model:
    model = loaded(trained, trained.state_dict())
    keep_in_fp8(model)
    return model


def test_matrices_take_a_byte_and_four_a_row(trained, kept):
    def size(model):
        return sum(parameter.nbytes for layer in model.blocks for parameter in layer.parameters())

    matrices = [layer.weight for layer in trained.modules() if isinstance(layer, SplitLinear)]
    assert size(trained) - size(kept) == sum(3 * weight.numel() - 4 * len(weight) for weight in matrices)
    assert kept.lm_head.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in kept.parameters())


@pytest.mark.parametrize("stored", ["export", "checkpoint"])
def test_a_matrix_is_converted_before_the_next_one_is_read(trained, tmp_path, monkeypatch, stored):
    """Loaded in fp8 is loaded and then converted, bit for bit; with the memory of one matrix more than what is kept."""
    save_pretrained(trained, tmp_path / "export", torch.float32)
    with ReleasedWeights(tmp_path / "export") as weights:
        checkpoint = write_checkpoint(weights, tmp_path, "fp32")
    monkeypatch.setattr(fp8_weights, "BAND_ELEMENTS", 512)
    place = str(tmp_path / "export" if stored == "export" else checkpoint)
    for precision, width in (("fp32", 4), ("bf16", 2)):
        wanted = load_any_model(place, "cpu", precision)
        keep_in_fp8(wanted)
        with LiveMemory() as memory:
            loaded = load_any_model(place, "cpu", precision, fp8_weights=True)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        for (name, there), here in zip(wanted.named_parameters(), loaded.parameters(), strict=True):
            assert there.shard_spec == here.shard_spec, name
            assert torch.equal(*(each.detach().view(torch.uint8) for each in (there, here))), name
        largest = max(parameter.numel() for parameter in trained.parameters())
        kept = sum(parameter.nbytes for parameter in loaded.parameters())
        on_host = 0 if width == 4 else 4  # a matrix is read in fp32
        assert memory.current == kept
        assert memory.peak - kept < (width + on_host) * largest + 16 * fp8_weights.BAND_ELEMENTS


def test_every_way_to_decode(kept, tmp_path):
    exact = emulated(kept)
    wanted = [plain(exact, prompt, COUNT)[0] for prompt in prompts()]
    for options in ({"rows": 1}, {"rows": 4, "together": 4}, {"rows": 6, "together": 3, "chunk": 3}):
        assert generate(kept, prompts(), max_new_tokens=COUNT, sampler=GREEDY, **options) == wanted
    ids, logits = plain(exact, prompts()[3], COUNT)
    with recorded_logits() as found:
        assert generate(kept, [prompts()[3]], max_new_tokens=COUNT, sampler=GREEDY) == [ids]
    assert (torch.cat(found) - logits).abs().max() < 1e-5 * logits.abs().max()
    session = Session(kept, Prefix.of(kept, prompts()[3]))
    session.save(tmp_path / "prefix")
    assert list(Session.load(kept, tmp_path / "prefix").ask(max_new_tokens=COUNT, sampler=GREEDY)) == ids
    with pytest.raises(ConfigError, match=r"weights in torch\.float32 and fp8, not torch\.float32"):
        Session.load(exact, tmp_path / "prefix")
    given, kinds = (
        Prefix.of(kept, prompts()[3]),
        r"another model: weights in .* and fp8, not .*32 \(setting fp8_weights\)",
    )
    for use in (
        lambda: Session(exact, given).save(tmp_path / "other"),
        lambda: Session(exact, given).feed([1]),
        lambda: list(Generator(exact, 1).stream([Request((), given)])),
    ):
        with pytest.raises(ValueError, match=kinds):
            use()


def test_held_out_figures_are_those_of_the_numbers(trained, kept):
    documents = Documents([ids.numpy() for ids in sequences(6, 50, seed=0)], [50] * 6, ["of a rule"] * 6)
    nats = [evaluate_documents(model, documents).nats_per_token for model in (emulated(kept), kept, trained)]
    assert abs(nats[1] - nats[0]) < 1e-6
    assert 0 < abs(nats[1] - nats[2]) < 0.02


@pytest.mark.parametrize("config", [TRANSFORMER, HYBRID], ids=lambda config: config.name)
def test_other_architectures(config):
    model = reference_model(config, seed=2, dtype=torch.float32)
    keep_in_fp8(model)
    tokens = torch.tensor(prompts()[3])[None]
    torch.testing.assert_close(model(tokens).logits, emulated(model)(tokens).logits, rtol=1e-4, atol=1e-5)


def test_scores_have_a_name_of_their_own_and_an_export_is_refused(trained, kept, tmp_path):
    make_text_shards(tmp_path / "shards")
    save_pretrained(trained, tmp_path / "export")
    given = {"checkpoint": str(tmp_path / "export"), "manifest": str(tmp_path / "shards/manifest.json")}
    name, of_fp8 = (checked(ScoreConfig(**given, fp8_weights=each))[1] for each in (False, True))
    assert of_fp8 == f"{name}-fp8"
    with pytest.raises(ConfigError, match="no released layout holds weights in fp8"):
        save_pretrained(kept, tmp_path / "export")


def test_a_gpu_that_cannot_is_named(monkeypatch, trained):
    monkeypatch.setattr(fp8_weights, "obstacle", lambda device: "the GPU's compute capability 8.0 is older")
    with pytest.raises(ConfigError, match=r"^fp8_weights=true cannot be used: the GPU's compute capability 8\.0"):
        keep_in_fp8(trained)
