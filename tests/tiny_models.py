"""Real but tiny random chat models and LoRA adapters, so that tests run the real libraries in seconds.

torch, transformers and peft are imported inside the functions: collecting tests stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

EOS = "<|im_end|>"
PAD = "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINING_LINES = (
    "Where is my order? Your order is on its way and arrives on Tuesday.",
    "I would like to return the lamp. Of course: here is the label, please keep the receipt.",
    "Hello! Thank you for writing to the shop, how can I help you today?",
    "Kann ich das zurückgeben? 注文はどこですか。お問い合わせありがとうございます。 👍",
)


def make_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer with the ChatML template: every text, emoji included, round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, "<|im_start|>", EOS, "<|endoftext|>"],  # the last: Qwen2Tokenizer adds it anyway
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(folder: Path, seed: int = 0, *, max_positions: int = 256) -> Path:
    """Write a random Qwen2 chat model (hidden 64, 2 layers, float32 safetensors) and return its folder.

    The same seed writes the same weights. Logits are sharpened a little, so that greedy answers do not
    hang on the last bits of a sum.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_positions,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).to(torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    model_folder: Path,
    seed: int = 1,
    rank: int = 4,
    *,
    scale: float = 0.3,
    target_modules: tuple[str, ...] = TARGET_MODULES,
) -> Path:
    """Write a real PEFT LoRA adapter of the model with random, non-zero weights and return its folder.

    `scale` is the standard deviation of both factors: large enough that answers visibly differ from the base.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder
