"""Tokenizers as real checkpoints have them, by their parts: what they may change, and what is refused."""

import re
import unicodedata
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from dapo_megatron.data.lossless import check_lossless
from dapo_megatron.errors import ConfigError

TEXTS = [
    "What is 12*(3+4)?",
    "  two blanks, a\ttab,\n\na new line and blanks at the end  ",
    "求 \\(x^2\\) 的值。",
    "🙂👩\u200d🔬 \u0928\u093f",
    "x² + ½, ﬁ",
    "re\u0301sume\u0301",
    "I'LL say it's 3.14 \r\n",
]


def bytes_of(*specials: str) -> dict[str, int]:
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return {token: index for index, token in enumerate(tokens)}


def qwen2() -> PreTrainedTokenizerFast:
    return Qwen2Tokenizer(bytes_of("<|endoftext|>"), [])


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level without a normalizer, <begin> in front."""
    core: Any = Tokenizer(models.BPE(vocab=bytes_of("<begin>"), merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<begin>")


def sentencepiece(pieces: str = "▁abcdefghijklmnopqrstuvwxyz0123456789?*()+-. ") -> PreTrainedTokenizerFast:
    """A blank in front of every text, bytes for what has no piece: Llama 2's, Mistral's."""
    specials = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate([*specials, *dict.fromkeys(pieces)])}
    core: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def keeps_dummy_blank() -> PreTrainedTokenizerFast:
    """Its decoder leaves the blank in front that the encoder added."""
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def check(tokenizer: PreTrainedTokenizerFast, *texts: str) -> None:
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    check_lossless(tokenizer, texts, ids, [f"a.jsonl:{number}" for number in range(1, len(texts) + 1)])


@pytest.mark.parametrize("make", [qwen2, llama3, sentencepiece, keeps_dummy_blank])
def test_tokenizers_that_know_bytes_lose_nothing(make) -> None:
    check(make(), *TEXTS, *(unicodedata.normalize("NFC", text) for text in TEXTS))


def test_qwen2_composes_accents_which_is_the_same_text() -> None:
    tokenizer = qwen2()
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
    check(tokenizer, "e\u0301")


def test_a_compatibility_form_is_another_text() -> None:
    tokenizer = qwen2()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"a.jsonl:2: 'x²\+1' comes back as 'x2\+1'; '²' becomes tokens \[18\], '2'"):
        check(tokenizer, "x+1", "x²+1")


def test_unknown_characters_are_named_with_their_tokens(tokenizer) -> None:
    message = (
        r"the tokenizer changes 2 of 3 prompts. The first is a.jsonl:2: 'is 7#8=\?' comes back as 'is 7<unk>8=\?'; "
        r"'#' becomes tokens \[4\], '<unk>'. The model would be trained on other questions"
    )
    with pytest.raises(ConfigError, match=message):
        check(tokenizer, "is 7+8=?", "is 7#8=?", "§")


def test_characters_without_a_token_are_dropped_by_some_and_named() -> None:
    tokenizer = Qwen2Tokenizer({"<|endoftext|>": 0, "7": 1, "+": 2}, [])
    text = "7" * 50 + " + 七" + "7" * 50
    with pytest.raises(ConfigError) as refused:
        check(tokenizer, text)
    assert f"...{'7' * 20 + ' + 七' + '7' * 16!r}... comes back as" in str(refused.value)
    assert "' ' becomes nothing, '七' becomes nothing." in str(refused.value)


def test_many_unknown_characters_are_counted() -> None:
    with pytest.raises(ConfigError, match="'e' becomes nothing, and 3 more characters"):
        check(Qwen2Tokenizer({"<|endoftext|>": 0}, []), "abcdefgh")


def test_a_loss_between_characters() -> None:
    """No character is at fault: the pre-tokenizer drops a blank between two others."""
    core: Any = Tokenizer(models.WordLevel({"1": 0, "2": 1, " ": 2}, unk_token="1"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(?<=[0-9]) (?=[0-9])"), "removed"), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    core.decoder = decoders.Fuse()
    with pytest.raises(ConfigError, match=re.escape("'1 2' comes back as '12'; every character survives alone")):
        check(PreTrainedTokenizerFast(tokenizer_object=core), "1 2")


def test_a_blank_behind_the_tokens_of_a_chat_template_is_no_loss() -> None:
    """Each begins a text of its own for SentencePiece, so one comes in."""
    tokenizer = sentencepiece()
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<s>"]})
    check(tokenizer, "<s>1+1=? 2</s><s>  x", "a</s>b <s> c")
    assert tokenizer.decode(tokenizer.encode("<s>1", add_special_tokens=False)) == "<s> 1"
    with pytest.raises(ConfigError, match=r"changes 1 of 1 prompts.*'<s>a B' comes back as '<s>a b'"):
        lossy = sentencepiece()
        lossy.add_special_tokens({"additional_special_tokens": ["<s>"]})
        lossy.backend_tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
        check(lossy, "<s>a B")
