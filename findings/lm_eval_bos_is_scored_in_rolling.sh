#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness) with transformers 5.23.0: the model `hf` with add_bos_token=True gives a text of
# loglikelihood_rolling (perplexity tasks) two bos, and scores the second one as if it were part of the text. The harness
# puts its prefix token, bos where the tokenizer has one, in front of every such text in any case; the setting is for
# contexts alone (multiple choice, generation), which get no bos without it.
#
# Guessed: add_bos_token=True gives every text one bos, which is not scored.
# Seen: rolling, add_bos_token=False: after [1] scored [3, 4, 3]; True: after [1] scored [1, 3, 4, 3]
#   context and continuation, False: after [3, 4] scored [3]; True: after [1, 3, 4] scored [3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "$@"; }
pip torch==2.13.0 numpy==2.4.6 transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 datasets==5.2.0 sacrebleu==2.6.0 jinja2==3.1.6 \
    more-itertools==11.2.1 requests==2.34.2
pip --no-deps lm_eval==0.4.13
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - "$folder/model" 2>/dev/null <<'PYTHON'
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken, Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

entries = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, []))
entries.add_special_tokens([AddedToken(entry, special=True) for entry in ("<pad>", "<s>", "</s>")])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=entries, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])


class Shown(HFLM):
    """Keeps what is scored: (tokens before, scored tokens) of each request."""

    def _loglikelihood_tokens(self, requests, **settings):
        self.asked = [(list(before), list(scored)) for _, before, scored in requests]
        return super()._loglikelihood_tokens(requests, **settings)


def asked(kind, arguments, bos):
    model = Shown(pretrained=sys.argv[1], add_bos_token=bos, device="cpu", batch_size=1)
    getattr(model, kind)([Instance(kind, {}, arguments, 0)])
    return model.asked[0]


found = []
for name, kind, arguments in (
    ("rolling", "loglikelihood_rolling", ("aba",)),
    ("context and continuation", "loglikelihood", ("ab", "a")),
):
    found += [asked(kind, arguments, bos) for bos in (False, True)]
    (before, scored), (before_too, scored_too) = found[-2:]
    said = f"after {before} scored {scored}; True: after {before_too} scored {scored_too}"
    print(f"{name}, add_bos_token=False: {said}")
wanted = [([1], [3, 4, 3]), ([1], [1, 3, 4, 3]), ([3, 4], [3]), ([1, 3, 4], [3])]
raise SystemExit(found != wanted)
PYTHON
