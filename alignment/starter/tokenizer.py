"""The starter model's tokenizer: byte-level BPE with single digits, and a prefix-stable ChatML template.

Prefix-stable: rendering a conversation with one more message continues the ids of the shorter one exactly.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.starter.corpus import Corpus
from alignment.starter.dialogues import sources
from alignment.starter.forms import expand
from alignment.starter.noise import NoiseRates, replace_synonyms

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY_SIZE = 2048
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT_TOKENS = 1024
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Words with the space before them, one digit at a time, punctuation, line ends, other white space.
_PIECES = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]|\s+(?!\S)|\s+"

_INSIDE_A_WORD = re.compile(r"(?<=[A-Za-z])(?=[a-z])")
CUT_RATE = 0.05  # of the places inside words


def train_tokenizer(corpus: Corpus, *, seed: int) -> Tokenizer:
    """Learns the merges from the training part of the corpus alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus, seed=seed), trainer=trainer)
    return tokenizer


def _texts(corpus: Corpus, *, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    found = sources(corpus, part="training", rates=NoiseRates())
    lists = [*found.questions.items(), *found.without_slot.items(), *found.topics.items()]
    lists += [("", found.standalone), ("", found.subjects), ("", found.frames)]
    lists += [("", forms) for forms in found.follow_ups.values()]
    for intent, forms in lists:
        for form in forms:
            for rate in (0.0, 0.4, 0.4):
                text = replace_synonyms(expand(form, rng), table=found.synonyms[intent], rate=rate, rng=rng)
                yield f" {text.lower()}"
            yield expand(form, rng)
    for group in corpus.groups.values():
        yield from (text for texts in group.wordings.values() for text in texts)
    wrappers = corpus.wrappers
    yield from (*wrappers.openers, *wrappers.closers, *wrappers.systems, *wrappers.stories)
    for product in corpus.products:
        yield from (
            f" {text}" for text in (product.name, product.name.lower(), product.size, product.care) * 4
        )
    yield from ["user\nassistant\nsystem\n"] * 50


def chat_tokenizer(tokenizer: Tokenizer) -> Any:
    """The same tokenizer as transformers and vLLM load it, with template, end and padding tokens."""
    import transformers

    tokenizer_class: Any = transformers.PreTrainedTokenizerFast
    fast = tokenizer_class(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(folder: Path) -> Any:
    """Loads the saved tokenizer through ``AutoTokenizer``, as every engine does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class DialogueEncoder:
    """Encodes messages piece by piece exactly as the template does, and says which tokens are answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._exact = tokenizer
        self._end = int(tokenizer.token_to_id(END) or 0)
        self._line = self.plain("\n")
        roles = ("system", "user", "assistant")
        self._roles = {
            role: [int(tokenizer.token_to_id(START) or 0), *self.plain(f"{role}\n")] for role in roles
        }

    def plain(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return list(self._exact.encode(text, add_special_tokens=False).ids)

    def head(self, role: str) -> list[int]:
        """Ids before a message's content."""
        return self._roles[role]

    def message(self, role: str, content: str) -> tuple[list[int], list[int]]:
        """Ids of the message's head and of its content with the end token; a line end follows both."""
        return self._roles[role], [*self.plain(content), self._end]

    def answer(self, content: str, *, exact: Sequence[str]) -> tuple[list[int], list[bool]]:
        """Ids of an answer and its end token, and which of them belong to one of the ``exact`` texts in it."""
        encoding = self._exact.encode(content, add_special_tokens=False)
        spans = [match.span() for text in exact for match in re.finditer(re.escape(text), content)]
        marks = [any(a < end and b > start for start, end in spans) for a, b in encoding.offsets]
        return [*encoding.ids, self._end], [*marks, False]

    def varied(self, content: str, rng: random.Random) -> list[int]:
        """Ids of a text and the end token, some words cut in two before encoding: seeded subword variation.

        It has the effect of BPE-dropout (Provilkov et al. 2020), whose implementation cannot be seeded.
        """
        parts = _INSIDE_A_WORD.split(content)
        cut = "".join(part + ("\n" if rng.random() < CUT_RATE else "") for part in parts)
        pieces = self._exact.encode_batch(cut.strip("\n").split("\n"), add_special_tokens=False)
        return [*(token for piece in pieces for token in piece.ids), self._end]

    @property
    def line(self) -> list[int]:
        """Ids of the line end after a message."""
        return self._line

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of the conversation with the head of the assistant's next message."""
        ids: list[int] = []
        for message in messages:
            head, content = self.message(message["role"], message["content"])
            ids += [*head, *content, *self._line]
        return [*ids, *self._roles["assistant"]]
