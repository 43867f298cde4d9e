"""The tiny model: a Llama of under a million parameters and a tokenizer with one token a character.

Both are ordinary Hugging Face objects, so everything downstream (vLLM, transformers, the learner) treats them like any
other model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast  # without torch, so that preflight can render prompts at once

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from conf.schema import ModelConfig

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
# `:`, `J`, `Y` and `N` are for recipes in which the model also judges (J marks a judge's prompt, Y and N its verdicts).
CHARACTERS = "0123456789+-*=\n#:JYN"
VOCABULARY = {token: index for index, token in enumerate([PAD, BOS, EOS, *CHARACTERS, UNKNOWN])}


def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a character, newline included; puts `<s>` before every text and decodes without inserting spaces."""
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, VOCABULARY[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def make_model(config: ModelConfig) -> LlamaForCausalLM:
    """A randomly initialised Llama of the size in `config.tiny`; its weights depend on `config.tiny.seed` alone."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tiny = config.tiny
    llama = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_heads,
        max_position_embeddings=config.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # short contexts need no long wavelengths
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
    )
    with torch.random.fork_rng():
        torch.manual_seed(tiny.seed)
        model = LlamaForCausalLM(llama)
    model.generation_config = GenerationConfig(
        bos_token_id=VOCABULARY[BOS], eos_token_id=VOCABULARY[EOS], pad_token_id=VOCABULARY[PAD]
    )
    return model.to(torch.float32)
