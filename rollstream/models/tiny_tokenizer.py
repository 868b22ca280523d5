"""A byte-level BPE tokenizer trained on payload text, with Qwen's special tokens and 1000 coordinate tokens.

Structure takes few tokens. As with ordinary tokenizers, the one by which a list goes on or ends after an
object (``"]},`` or ``"]}}``) also holds what closes the object.
"""

from __future__ import annotations

import random
import re
from typing import Any, Final

from broker_schemas.method.coordinates import NUM_BINS, coordinate_token
from broker_schemas.method.payload import render_payload
from broker_schemas.method.prompt import DEFAULT_INSTRUCTION, DEFAULT_SYSTEM_PROMPT
from broker_schemas.records.records import GroundTruthObject
from rollstream.datasets.digit_outline import DIGIT_NAMES

QWEN_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WILDCARD_COORDINATE: Final = "<|coord_*|>"
PIECE_PATTERN: Final = (
    r'\{"object_| "object_|": \{"desc": "|", "bbox_2d": \["|", "poly": \[\["|"\], \["|", "'
    r"| ?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"
)
CHAT_TEMPLATE: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' or 'video' in part %}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BLOOD_CELL_NAMES: Final = ("RBC", "WBC", "Platelets")
EVERYDAY_NAMES: Final = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "ball"),
    *("backpack", "umbrella", "handbag", "tie", "suitcase", "kite", "skateboard", "surfboard", "bottle"),
    *(
        "wine glass",
        "cup",
        "fork",
        "knife",
        "spoon",
        "bowl",
        "banana",
        "apple",
        "sandwich",
        "orange",
        "pizza",
    ),
    *("cake", "chair", "couch", "plant", "bed", "table", "toilet", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "oven", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("toothbrush", "leaf", "tree", "door", "window", "building", "road", "sky"),
)
_COORDINATE_PATTERN: Final = re.compile(r"<\|coord_\d+\|>")


def make_tiny_tokenizer(seed: int, num_merges: int = 640, num_payloads: int = 4000) -> Any:
    """Return a transformers fast tokenizer with at most 256 + ``num_merges`` plain tokens.

    Special tokens follow the plain ones: Qwen's, the 1000 coordinates in bin order, the wildcard.
    Equal arguments give an equal tokenizer.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(seed, num_payloads), trainer)
    special = [*QWEN_TOKENS, *map(coordinate_token, range(NUM_BINS)), WILDCARD_COORDINATE]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def training_texts(seed: int, num_payloads: int) -> list[str]:
    """Return seeded prompt and payload text, cut at coordinate tokens, which are never trained on."""
    generator = random.Random(seed)
    texts: list[str] = []
    for index in range(num_payloads):
        if index % 8 == 0:
            texts.append(f"system\n{DEFAULT_SYSTEM_PROMPT}\nuser\n{DEFAULT_INSTRUCTION}\nassistant\n")
        objects = [_invented_object(generator) for _ in range(generator.randint(0, 14))]
        texts.extend(piece for piece in _COORDINATE_PATTERN.split(render_payload(objects).text) if piece)
    return texts


def _invented_object(generator: random.Random) -> GroundTruthObject:
    names = generator.choice((DIGIT_NAMES, BLOOD_CELL_NAMES, EVERYDAY_NAMES))
    desc = generator.choice(names)
    if generator.random() < 0.25:
        num_values = 2 * generator.randint(3, 8)
        bins = tuple(generator.randrange(NUM_BINS) for _ in range(num_values))
        return GroundTruthObject(desc=desc, geometry="poly", bins=bins)
    x1, x2 = sorted(generator.sample(range(NUM_BINS), 2))
    y1, y2 = sorted(generator.sample(range(NUM_BINS), 2))
    return GroundTruthObject(desc=desc, geometry="bbox_2d", bins=(x1, y1, x2, y2))
