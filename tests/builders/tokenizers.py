"""Real tokenizers with the coordinate tokens, trained in place on payloads, and what tests feed them."""

from __future__ import annotations

import random
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from broker_schemas.method.coordinates import NUM_BINS, CoordVocabulary, coordinate_token
from broker_schemas.method.payload import render_payload
from broker_schemas.records.records import GroundTruthObject

DESCRIPTIONS = (
    "WBC",
    "leaf",
    "red car",
    "café crème",
    "猫と犬",
    "naïve 🙂 face",
    'a "quoted" thing',
    "back\\slash",
)


def make_box(desc: str = "WBC", bins: tuple[int, ...] = (406, 368, 767, 784)) -> GroundTruthObject:
    """Return a valid labelled box."""
    return GroundTruthObject(desc=desc, geometry="bbox_2d", bins=bins)


def make_polygon(desc: str = "leaf", bins: tuple[int, ...] = (1, 2, 30, 4, 15, 60)) -> GroundTruthObject:
    """Return a valid labelled polygon."""
    return GroundTruthObject(desc=desc, geometry="poly", bins=bins)


def random_objects(seed: int, num_objects: int, polygon_share: float = 0.4) -> list[GroundTruthObject]:
    """Return valid objects: boxes of at least 4 bins a side and polygons of 3 to 8 vertices."""
    rng = random.Random(seed)
    objects = []
    for _ in range(num_objects):
        desc = rng.choice(DESCRIPTIONS)
        if rng.random() < polygon_share:
            bins = tuple(rng.randrange(NUM_BINS) for _ in range(2 * rng.randint(3, 8)))
            objects.append(make_polygon(desc, bins))
        else:
            x, y = rng.randrange(800), rng.randrange(800)
            objects.append(make_box(desc, (x, y, x + rng.randint(4, 199), y + rng.randint(4, 199))))
    return objects


@cache
def plain_tokenizer() -> Tokenizer:
    """Return a byte-level BPE like the model's own: ``<|im_end|>`` and the coordinates are special tokens."""
    tokenizer = _byte_level(900, pre_tokenizers.ByteLevel(add_prefix_space=False))
    _add_special(tokenizer, ["<|im_end|>", "<|image_pad|>"])
    return tokenizer


@cache
def fusing_tokenizer() -> Tokenizer:
    r"""Return a byte-level BPE that fuses across words: ``}}``, ``"},``, ``"]`` and more are single tokens.

    ``<|im_end|>`` is no special token: ordinary tokens spell it, also together with what stands before it.
    """
    tokenizer = _byte_level(1400, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    _add_special(tokenizer, [])
    return tokenizer


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """Return a BPE with byte fallback and ``▁`` for a blank, as SentencePiece models export it."""
    characters = sorted(set('{}[]":, abcdefghijklmnopqrstuvwxyzWBC_0123456789<|>') - {" "}) + ["▁"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {character: 256 + index for index, character in enumerate(characters)}
    for left, right in (merges := [('"', "}"), ('"}', "}"), ("▁", '"'), ("]", "}")]):
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_special(tokenizer, ["<|im_end|>"])
    return tokenizer


@cache
def coord_vocabulary(tokenizer: Tokenizer) -> CoordVocabulary:
    """Return the coordinate vocabulary of one of the tokenizers above."""
    return CoordVocabulary.from_token_to_id(tokenizer.token_to_id)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of ``text``, without special tokens around it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """Return the id of the token written ``text``, which must exist."""
    found: int | None = tokenizer.token_to_id(text)
    assert found is not None, f"no token {text!r}"
    return found


def _byte_level(vocabulary_size: int, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_training_texts(), trainer=trainer)
    return tokenizer


def _training_texts() -> list[str]:
    texts = [render_payload(random_objects(seed, 6)).text for seed in range(40)]
    # Without the coordinate tokens, as an added token never takes part in the training of merges.
    pieces = [piece for text in texts for piece in _without_coordinates(text)]
    return pieces + ['"}}<|im_end|>', "]}}<|im_end|>", "}}<|im_end|>\n", '"]}}, "object_'] * 30


def _without_coordinates(text: str) -> list[str]:
    head, *parts = text.split("<|coord_")
    return [head, *(part.split("|>", 1)[1] for part in parts)]


def _add_special(tokenizer: Tokenizer, others: list[str]) -> None:
    texts = [*others, *(coordinate_token(index) for index in range(NUM_BINS))]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
