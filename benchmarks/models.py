"""Random Llamas for benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 32_000


def make_llama(folder: Path, *, hidden: int, layers: int, heads: int, tied: bool = True) -> Path:
    """A Llama with random weights and a tokenizer of one word a token: token i is `t<i>`, 1 ends a sequence."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    special = ["<s>", "</s>", "<pad>"]  # special tokens are found within words as well: none may begin another
    names = [*special, *(f"t{number}" for number in range(len(special), VOCABULARY))]
    words = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<s>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder
