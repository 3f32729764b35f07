"""Real tokenizers, trained in a moment, for tests of several rooms."""

from pathlib import Path

MULTILINGUAL = (
    "The quick brown fox jumps over the lazy dog. 12 + 34 = 46, so x = 7.",
    "Größe, Äpfel und Öl: schöne Grüße aus Köln; français, élève, garçon, où.",
    "Съешь же ещё этих мягких французских булок. Ответ: сорок шесть.",
    "素早い茶色の狐がのろまな犬を飛び越える。答えは四十六です。",
    "如果 x 加 7 等于 46,那么 x 等于 39。所以答案是 39。",
    "النص العربي من اليمين إلى اليسار، والجواب ستة وأربعون.",
    "हिन्दी में उत्तर छियालीस है। ไทยไม่มีช่องว่าง คำตอบคือ 46",
    "Emoji 🙂🚀👩‍👩‍👧‍👦🏳️‍🌈 and maths ∑∫√≠≤→, 𝔸𝕓𝕔, 𝒙² + 𝒚² = 1.",
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def save_byte_level(folder: Path, vocab_size: int = 400) -> Path:
    """A byte-level BPE with a ChatML template in the manner of Qwen, saved in HF layout."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(MULTILINGUAL * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(str(folder))
    return folder


def save_sentencepiece_like(folder: Path) -> Path:
    """A BPE with byte fallback and a space put before a text, in the manner of Llama 2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789+=."]
    merges = [("▁", "a"), ("▁", "h"), ("h", "e"), ("▁h", "e"), ("l", "l"), ("▁", "x")]
    words = [*specials, *pieces, *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(str(folder))
    return folder
