"""TransNormerLLM (arXiv 2307.14995) for Hugging Face transformers 5, in one file that needs torch and transformers.

    x = E[ids] * sqrt(D)                    the factor is left out where no_scale_embedding is true
    for each layer: x = x + GLA(norm(x)); x = x + SGLU(norm(x))
    logits = norm(x) E^T

B batch, T tokens, D = decoder_embed_dim, H = decoder_attention_heads, d = D / H, F = glu_dim, V = vocab_size; K is the
width of q and k: 2d in a layer with LRPE, d in the others. The attention runs in megatron_tn's Triton kernels where the
package `kernels` of that project is installed, and in plain PyTorch everywhere else.
"""

import math

import torch
from torch import Tensor, nn

try:  # of transformers 5
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers import initialization as init
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
except ImportError as error:
    import transformers

    raise ImportError(f"this model needs transformers 5; {transformers.__version__} is installed: {error}") from None

try:  # of megatron_tn; another package of this name has no `gla`
    from kernels import gla as kernel_gla
except ImportError:
    kernel_gla = None

CHUNK = 64  # tokens of one step of the plain PyTorch attention, whose time grows with T x CHUNK
NORM_TYPES = ("simplermsnorm", "rmsnorm", "layernorm")
ACTIVATIONS = {
    "silu": nn.functional.silu,
    "swish": nn.functional.silu,
    "none": lambda x: x,
    "1+elu": lambda x: 1 + nn.functional.elu(x),
    "relu": nn.functional.relu,
}


class TransnormerConfig(PreTrainedConfig):
    """Fields of the released family's config.json.

    decay_rates: [L][H], rate of each head's decay a token; None means the released family's formula.
    megatron_tn: variants that the family does not have: norm_eps, glu_act, gate, absolute_positions.
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "intermediate_size": "glu_dim",
    }

    vocab_size: int = 64000
    decoder_embed_dim: int = 1024
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    glu_dim: int = 2816
    linear_use_lrpe_list: list | None = None  # [L] of 0 and 1; None: the first layer alone
    linear_act_fun: str = "silu"  # of q and k
    norm_type: str = "simplermsnorm"
    no_scale_embedding: bool = False
    bias: bool = False
    init_std: float = 0.02
    decay_rates: list | None = None
    megatron_tn: dict | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        layers, heads = self.decoder_layers, self.decoder_attention_heads
        if self.linear_use_lrpe_list is None:
            self.linear_use_lrpe_list = [1] + [0] * (layers - 1)
        if self.decay_rates is None:
            self.decay_rates = [released_decay_rates(heads, layer, layers) for layer in range(layers)]
        variants = {"norm_eps": 1e-6, "glu_act": "none", "gate": True, "absolute_positions": False}
        self.megatron_tn = variants | (self.megatron_tn or {})
        super().__post_init__(**kwargs)
        for name, known in (("linear_act_fun", ACTIVATIONS), ("norm_type", NORM_TYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.bias:
            raise ValueError("bias=true, but this model has no biases")
        if self.decoder_embed_dim % heads:
            raise ValueError(
                f"decoder_embed_dim={self.decoder_embed_dim} is not divisible by decoder_attention_heads={heads}"
            )
        if len(self.linear_use_lrpe_list) != layers:
            raise ValueError(
                f"linear_use_lrpe_list has {len(self.linear_use_lrpe_list)} entries but decoder_layers={layers}"
            )
        if [len(rates) for rates in self.decay_rates] != [heads] * layers:
            raise ValueError(f"decay_rates must have decoder_layers={layers} rows of {heads} rates, one a head")


def released_decay_rates(heads: int, layer: int, layers: int) -> list[float]:
    """[H]: slope(h) * (1 - l/(L-1) + 1e-5), ALiBi's slopes (arXiv 2108.12409) times a factor of the layer l."""

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    power = 2 ** math.floor(math.log2(heads))
    slopes = geometric(power) + geometric(2 * power)[0::2][: heads - power]
    return [slope * (1 - layer / max(layers - 1, 1) + 1e-5) for slope in slopes]


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """positions [..] -> fp32 [.., D]: sin(w_j t), cos(w_j t) in columns 2j, 2j + 1, w_j = 10000^(-2j/D)."""
    column = torch.arange(width, device=positions.device)
    frequency = 10000.0 ** (-2 * (column // 2).double() / width)
    return torch.sin(positions.double()[..., None] * frequency + (column % 2).double() * (math.pi / 2)).float()


class RecurrentState(CacheLayerMixin):
    """One layer's state, fp32 [B, H, K, d] for any number of tokens, and how many tokens it has seen."""

    is_compileable = False
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.state: Tensor | None = None
        self.length = 0

    def set(self, state: Tensor, tokens: int) -> None:
        """state [B, H, K, d] after `tokens` more tokens."""
        self.state, self.length, self.is_initialized = state, self.length + tokens, True

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1  # no limit

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a recurrent state cannot forget its last tokens: keep a copy of an earlier state")

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError("a recurrent state holds no keys and values")

    update = lazy_initialization


class RecurrentCache(Cache):
    """`past_key_values` of this model: one `RecurrentState` a layer, no keys and values."""

    def __init__(self, layers: int):
        super().__init__(layers=[RecurrentState() for _ in range(layers)])

    @property
    def is_linear(self) -> list[bool]:
        return [True] * len(self.layers)


def inverse_rms(square_sum: Tensor, width: int, eps: float) -> Tensor:
    """square_sum [..] of vectors of `width` -> the factors [.., 1] that norm them, fp32."""
    return torch.rsqrt(square_sum / width + eps).unsqueeze(-1)


class SimpleRMSNorm(nn.Module):
    """x [.., D] -> x / sqrt(mean(x^2) + eps), times a weight [D] where norm_type is "rmsnorm"; statistics in fp32."""

    def __init__(self, config: TransnormerConfig):
        super().__init__()
        self.eps = config.megatron_tn["norm_eps"]
        self.weight = nn.Parameter(torch.ones(config.decoder_embed_dim)) if config.norm_type == "rmsnorm" else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = (wide * inverse_rms(wide.square().sum(-1), x.shape[-1], self.eps)).to(x.dtype)
        return normed if self.weight is None else normed * self.weight


class GateNorm(nn.Module):
    """The weight [D] of norm(o) where norm_type is "rmsnorm"."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.weight


def norm_of(config: TransnormerConfig) -> nn.Module:
    """The norm of [.., D] that norm_type names."""
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.decoder_embed_dim, eps=config.megatron_tn["norm_eps"])
    return SimpleRMSNorm(config)


class LRPE(nn.Module):
    """theta [H, 1, d], radians a token: x -> [x cos(theta t), x sin(theta t)] (arXiv 2307.09270)."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(heads, 1, head_dim))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x fp32 [B, T, H, d], positions [T] -> [B, T, H, 2d]."""
        # In fp32 the product theta t is off by 0.03 radians at a million tokens.
        angle = self.theta[:, 0].double() * positions[:, None, None].double()
        return torch.cat((x * angle.cos().float(), x * angle.sin().float()), dim=-1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """o_t = sum over s <= t of exp(-r (t - s)) (q_t . k_s) v_s, CHUNK tokens at a time; and the state after T tokens.

    q, k [B, T, H, K], v [B, T, H, d], all fp32; decay r >= 0 [H]; state [B, H, K, d], None for zeros.
    Every exponent is <= 0.
    """
    batch, length, heads, width = k.shape
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if state is None else state
    rate = decay.view(-1, 1, 1)
    outputs = []
    for start in range(0, length, CHUNK):
        chunk = [x[:, start : start + CHUNK].transpose(1, 2) for x in (q, k, v)]  # [B, H, C, ..]
        query, key, value = chunk
        count = value.shape[2]
        place = torch.arange(count, device=v.device, dtype=torch.float32)
        distance = place[:, None] - place
        weight = torch.exp(-rate * distance.clamp(min=0)) * (distance >= 0)  # [H, C, C]
        inside = (query @ key.transpose(-1, -2) * weight) @ value
        before = (query * torch.exp(-rate * (place[:, None] + 1))) @ state
        outputs.append((inside + before).transpose(1, 2))
        faded = key * torch.exp(-rate * (count - 1 - place[:, None]))
        state = torch.exp(-rate * count) * state + faded.transpose(-1, -2) @ value
    return torch.cat(outputs, dim=1), state


class GatedLinearAttention(nn.Module):
    """q, k, v, u = W x;  q, k = LRPE(act(q)), LRPE(act(k));  out = W_o (norm(o over all heads) * u)."""

    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__()
        width, heads = config.decoder_embed_dim, config.decoder_attention_heads
        self.heads = heads
        self.act = "silu" if config.linear_act_fun == "swish" else config.linear_act_fun
        self.gate, self.eps = config.megatron_tn["gate"], config.megatron_tn["norm_eps"]
        self.qkvu_proj = nn.Linear(width, 4 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.lrpe = LRPE(heads, width // heads) if config.linear_use_lrpe_list[layer] else None
        self.norm = None
        if config.norm_type != "simplermsnorm":
            self.norm = GateNorm(width) if config.norm_type == "rmsnorm" else norm_of(config)

    def forward(
        self, x: Tensor, positions: Tensor, decay: Tensor, state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D], positions [T], decay [H], state [B, H, K, d] -> [B, T, D], and the next state if keep."""
        qkvu = self.qkvu_proj(x)
        after_norm = isinstance(self.norm, nn.LayerNorm)  # the gate follows the norm: it does not commute with it
        gate = self.gate and not after_norm
        if kernel_gla is None:
            with torch.autocast(qkvu.device.type, enabled=False):
                y, square_sum, state = self.in_pytorch(qkvu.float(), positions, decay, state, gate)
        else:
            theta = None if self.lrpe is None else self.lrpe.theta
            options = {"act": self.act, "gate": gate, "positions": positions}
            y, square_sum, state = kernel_gla(qkvu, decay, theta, **options, initial_state=state, return_state=keep)
        if after_norm:
            y = self.norm(y.to(x.dtype))
            return self.out_proj(y * qkvu[..., -y.shape[-1] :] if self.gate else y), state
        y = (y.float() * inverse_rms(square_sum, y.shape[-1], self.eps)).to(x.dtype)
        return self.out_proj(y if self.norm is None else self.norm(y)), state

    def in_pytorch(
        self, qkvu: Tensor, positions: Tensor, decay: Tensor, state: Tensor | None, gate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `kernels.gla` of megatron_tn computes: o * u [B, T, D], sum of o^2 [B, T], and the next state."""
        q, k, v, u = qkvu.unflatten(-1, (4, self.heads, -1)).unbind(2)
        q, k = ACTIVATIONS[self.act](q), ACTIVATIONS[self.act](k)
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        o, state = linear_attention(q, k, v, decay, state)
        y = o * u if gate else o
        return y.flatten(2), o.square().sum((-1, -2)), state


class SGLU(nn.Module):
    """out = W_3 (act(W_1 x) * W_2 x), act being the identity in every released model."""

    def __init__(self, config: TransnormerConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.megatron_tn["glu_act"]]
        self.l1 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.decoder_embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.act(self.l1(x)) * self.l2(x))


class TransnormerBlock(GradientCheckpointingLayer):
    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__()
        self.token_norm = norm_of(config)
        self.token_mixer = GatedLinearAttention(config, layer)
        self.channel_norm = norm_of(config)
        self.channel_mixer = SGLU(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, positions: Tensor, decay: Tensor, state: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D], mask [B, T, 1] (0 at padding) -> [B, T, D] and, where keep is true, the next state."""
        normed = self.token_norm(x)
        if mask is not None:
            normed = normed * mask  # v of padding is then 0, since W has no bias, and nothing of it enters the state
        mixed, state = self.token_mixer(normed, positions, decay, state, keep)
        x = x + mixed
        return x + self.channel_mixer(self.channel_norm(x)), state


class TransnormerPreTrainedModel(PreTrainedModel):
    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransnormerBlock"]  # noqa: RUF012
    _is_stateful = True  # a state cannot go back some tokens: transformers refuses assisted decoding

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
            if self.config.pad_token_id is not None:
                init.zeros_(module.weight[self.config.pad_token_id])
        elif isinstance(module, LRPE):
            j = torch.arange(self.config.decoder_embed_dim, dtype=torch.float64, device=module.theta.device)
            init.copy_(module.theta, (10000 ** (-2 * j / len(j))).view(module.theta.shape).to(module.theta.dtype))
        elif isinstance(module, (SimpleRMSNorm, GateNorm)) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class TransnormerModel(TransnormerPreTrainedModel):
    """Token ids -> normed hidden vectors [B, T, D]."""

    def __init__(self, config: TransnormerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.decoder_embed_dim
        )  # the pad row learns, as in training
        self.layers = nn.ModuleList(TransnormerBlock(config, layer) for layer in range(config.decoder_layers))
        self.final_norm = norm_of(config)
        self.gradient_checkpointing = False
        # Numbers, which the first forward pass makes a tensor: a buffer would be cast to the weights' type.
        self.rates: Tensor | None = None
        self.post_init()

    def decay(self, device: torch.device) -> Tensor:
        """Decay rates, fp32 [L, H]."""
        if self.rates is None or self.rates.device != device:
            with torch.inference_mode(False):  # training may follow generation
                self.rates = torch.tensor(self.config.decay_rates, dtype=torch.float32, device=device)
        return self.rates

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T], or inputs_embeds [B, T, D], to which the embedding's factor is applied.

        attention_mask: [B, T], or [B, tokens of the cache + T]; 0 at padding, which must stand on the left where
            decoding goes on.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("cu_seq_lens_q: this model reads one document a row, not several packed into one")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not self.config.no_scale_embedding:
            x = x * math.sqrt(self.config.decoder_embed_dim)
        length = x.shape[1]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        cache = past_key_values
        if cache is None and use_cache:
            cache = RecurrentCache(len(self.layers))
        elif cache is not None and not isinstance(cache, RecurrentCache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}, but this model keeps a RecurrentCache")
        mask = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}, but [B, T] is needed")
            mask = attention_mask[:, -length:, None].to(x.dtype)
        start = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(start, start + length, device=x.device)
        if self.config.megatron_tn["absolute_positions"]:
            seen = positions
            if attention_mask is not None and attention_mask.shape[1] == start + length:  # padding counts no position
                seen = (attention_mask.long().cumsum(-1) - 1)[:, -length:]
            x = x + sinusoids(seen, x.shape[-1]).to(x.dtype)
        rates = self.decay(x.device)
        kept = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = (x,)
        for layer, block in enumerate(self.layers):
            before = None if cache is None else cache.layers[layer].state
            x, state = block(x, mask, positions.to(x.device), rates[layer].to(x.device), before, use_cache)
            if cache is not None and use_cache:
                cache.layers[layer].set(state, length)
            hidden += (x,) if kept else ()
        x = self.final_norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden[:-1], x) if kept else None,
        )


class TransnormerForCausalLM(TransnormerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransnormerConfig):
        super().__init__(config)
        self.model = TransnormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() leaves the cache to forward, which makes a RecurrentCache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """labels [B, T]: the input ids, -100 to ignore; they are shifted here.

        logits_to_keep: the number of last tokens whose logits are computed, 0 for all; or their places.
        Other arguments: see `TransnormerModel.forward`."""
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()
