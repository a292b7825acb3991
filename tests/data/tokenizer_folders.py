"""Small tokenizers and folders that have them, and 2,000 lines of mixed text."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from src.data.tokenizer import File, Tokenizer
from tests.data.corpora import synthetic

TEXT = "def naïve(x): return '🙂'  # äöü <eos>"
SCRIPTS = (
    *("中文字符和English混合 text、标点。", "日本語のテキスト カタカナ", "한국어 문장입니다 123", "Привет, как дела?"),
    *(
        "مرحبا ١٢٣",
        "Ελληνικά",
        "naïve café e\u0301te\u0301 A\u030a",
        "🙂👍🏽👩‍👩‍👧",
        "हिन्दी पाठ",
        "x = 1234567; y=0x1F  # hex",
    ),
    *(
        "\tone\t\ttwo",
        "    four",
        "trailing   ",
        "I'll we've DON'T it's 'S",
        "a\u00a0b\u2028c\u3000d",
        "HTTPServer ABCdef",
    ),
    *("∑∫√ ½ ² ③ Ⅻ ﬁ", "\r\nline\r end\n\n \n", "<s> </s> <|endoftext|> <|begin_of_text|> [BOS]", "def return naïve"),
)


def mixed_lines(count: int = 2000) -> list[str]:
    """Scripts, code, blanks and signs drawn from all over Unicode."""
    dice = random.Random(5)
    blocks = ((32, 127), (0xA0, 0x600), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (32, 33), (10, 14))

    def line() -> str:
        signs = "".join(chr(dice.randrange(*dice.choice(blocks))) for _ in range(dice.randrange(12)))
        return dice.choice(["", " ", "  "]).join([dice.choice(SCRIPTS), signs, dice.choice(SCRIPTS)])

    return [line() for _ in range(count)]


def backend(*specials: str, template: str | None = None) -> Backend:
    """A byte-level BPE of a few merges, with a template for the beginning and the end of a text."""
    made = Backend(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT, "def return def return naïve"] * 3, trainer)
    if template is not None:
        pairs = [(name, made.token_to_id(name)) for name in specials]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return made


def folder(path: Path, made: Backend, tokenizer_config: dict[str, Any] | None = None, **others: Any) -> Path:
    """tokenizer.json and other files by their names without .json."""
    path.mkdir(exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    files = others if tokenizer_config is None else {"tokenizer_config": tokenizer_config} | others
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def opened(path: Path, bos: str | None = None, eos: str | None = None) -> Tokenizer:
    return File(path=path, bos=bos, eos=eos).open(path.parent / "cache", synthetic())


def split_by(pattern: str, model: models.BPE) -> Backend:
    """A backend that splits words by a pattern, which Oniguruma reads, and joins bytes by `model`."""
    made = Backend(model)
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return made


def trained_ranks(lines: list[str]) -> Backend:
    """Byte-level BPE whose ids are ranks: first the bytes, then the merges in their order."""
    made = split_by(TikTokenConverter().pattern, models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    made.train_from_iterator(lines, trainer)
    return made


def ranks_file(made: Backend, count: int = 0) -> bytes:
    """Its vocabulary in tiktoken's form, filled up to `count` with bytes that no text has."""
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary = sorted(made.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(bytes_of[letter] for letter in token) for token, _ in vocabulary]
    tokens += [b"\xff\xff" + number.to_bytes(3) for number in range(count - len(tokens))]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def sentencepiece_model(lines: list[str], **options: Any) -> bytes:
    """As Llama 2's: BPE that falls back to bytes and leaves a text as it is."""
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()
