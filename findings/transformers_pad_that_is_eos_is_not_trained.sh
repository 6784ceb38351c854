#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU).
#
# Behaviour: LlamaForCausalLM hands pad_token_id to its embedding as padding_idx. Where the pad is another special token,
# such as the eos, which many tokenizers have as pad, each place in a text where the model reads that token gives the
# token's embedding no gradient, although the place takes part in attention and has a loss; a new model's embedding of it
# is zero. With the head tied to the embedding only the head's part of the gradient is left.
#
# Guess that was wrong: pad_token_id says how batches are padded, and changes nothing where nothing is padded.
#
# Output seen (|gradient| of the embedding of eos = 2, read in the text; |its initial values|):
#   pad_token_id=None: 0.33, 0.06
#   pad_token_id=2: 0.00, 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.4.6
$pip transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
text = torch.tensor([[1, 5, 2, 1, 6, 2]])  # two documents, each with bos = 1 and eos = 2
found = []
for pad in (None, 2):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=10, bos_token_id=1, eos_token_id=2, pad_token_id=pad, **shape)
    model = LlamaForCausalLM(config)
    weight = model.model.embed_tokens.weight
    initial = weight[2].norm().item()
    model(text, labels=text).loss.backward()
    found.append((weight.grad[2].norm().item(), initial))
    print(f"pad_token_id={pad}: {found[-1][0]:.2f}, {found[-1][1]:.2f}")
(gradient, initial), ignored = found
raise SystemExit(not (gradient > 0 and initial > 0 and ignored == (0.0, 0.0)))
PYTHON
