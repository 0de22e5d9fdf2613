"""Small random chat models in hub format, as LLaMA-2 and Mistral have their templates and tokenizers."""

import csv
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

from lib import paths

# the formats of LLaMA-2-chat (system block in the first question) and Mistral-Instruct v0.2 (no system turns)
LLAMA_TEMPLATE = (
    "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% set lead = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' if messages[0].role == 'system' else '' %}"
    "{% for turn in turns %}{% if turn.role == 'user' %}"
    "{{ bos_token }}[INST] {{ (lead if loop.first else '') ~ turn.content | trim }} [/INST]"
    "{% else %} {{ turn.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }} [/INST]"
    "{% elif turn.role == 'assistant' %}{{ turn.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('user and assistant turns only') }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (  # of Qwen2.5 and SmolLM2
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,  # large, so that a random model has opinions
}


def plain_texts():
    with open(paths.OPINIONS / "test.csv", encoding="utf-8", newline="") as file:
        return [row["Answer"] for row in csv.DictReader(file)][:400]


def byte_fallback_tokenizer():
    """As LLaMA-2 has it: spaces as U+2581, a few whole emojis, all else spelt <0xF0><0x9F>...; no padding token."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    texts = [*plain_texts(), *["fun 😄", "done ✅"] * 40]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    parts = json.loads(bpe.to_str())  # bytes are ordinary tokens, they were special to get their ids only
    parts["added_tokens"] = parts["added_tokens"][:3]
    bpe = Tokenizer.from_str(json.dumps(parts))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=LLAMA_TEMPLATE
    )
    assert tokenizer.pad_token is None
    return tokenizer


def byte_level_tokenizer(template=MISTRAL_TEMPLATE, special=("<pad>", "<s>", "</s>")):
    """As GPT-2, Llama 3 or Qwen have it: emojis seen often are one token, others some of bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*plain_texts(), *["fun 😄", "well — “so” …"] * 40, *["a 🎉", "b 🎈"] * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[1], eos_token=special[2], pad_token=special[0], chat_template=template
    )


def write_model(folder, config, tokenizer, ends=range(2, 40)):
    """A random model in hub format. ends: many, so that rows end at different lengths."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = list(ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_all(root):
    """Folders by kind: llama, mistral (grouped queries, a window shorter than the prompts) and qwen."""
    spm, level = byte_fallback_tokenizer(), byte_level_tokenizer()
    llama = LlamaConfig(vocab_size=len(spm), **SMALL)
    mistral = MistralConfig(vocab_size=len(level), num_key_value_heads=2, sliding_window=12, **SMALL)
    chatml = byte_level_tokenizer(CHATML_TEMPLATE, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    qwen = Qwen2Config(vocab_size=len(chatml), num_key_value_heads=2, **SMALL)
    several = range(300, 345)
    return {
        "qwen": write_model(root / "qwen", qwen, chatml, [2, *several]),
        "llama": write_model(root / "llama", llama, spm, [2, *several]),
        "mistral": write_model(root / "mistral", mistral, level, [2, *several]),
    }
