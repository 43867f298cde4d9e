"""Tiny models and their tokenizer, made on the spot: no hub, no files in the repository."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

KINDS = ("llama", "llama_tied", "qwen3", "gpt2")
CONTEXT = 64

SENTENCES = [
    "The contest begins at dawn, and each rival proposes an answer.",
    "A judge reads both answers; the better one is chosen, the other is rejected.",
    "Numbers such as 12 + 30 = 42 are added column by column.",
    "What is learned today is played against tomorrow.\n",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens; pad, bos and eos are 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def make_config(kind: str, vocab_size: int) -> LlamaConfig | Qwen3Config | GPT2Config:
    """Two layers, heads of 32 (the narrowest that vLLM's CPU attention takes), fewer key heads than query heads."""
    special = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        return GPT2Config(**special, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 16 * CONTEXT,
        "initializer_range": 0.2,
        "tie_word_embeddings": kind == "llama_tied",
    }
    return Qwen3Config(**special, **shape) if kind == "qwen3" else LlamaConfig(**special, **shape)


def make_weights(kind: str, seed: int, vocab_size: int) -> torch.nn.Module:
    """A model of that kind; another seed is another policy. Norms and biases are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, vocab_size), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_model(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes a whole model folder (config, tokenizer, safetensors) and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    make_weights(kind, seed, len(tokenizer)).save_pretrained(folder)
    return folder
