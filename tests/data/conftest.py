import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+=?{}abcdefghijklmnopqrstuvwxyz \n"
CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"


@pytest.fixture
def tokenizer():
    """One token per character; a plain text gets <begin> in front, as many base models want it."""
    specials = ["<end>", "<begin>", "<user>", "<reply>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<begin> $A", special_tokens=[("<begin>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<begin>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<reply>"]})
    fast.chat_template = CHAT
    return fast
