"""The chat prompt: the model's own template around the image and the instruction, as text and as token ids.

Needs jinja2 and tokenizers only, so that every role can build the same ids; equality with transformers'
``apply_chat_template`` is tested. It knows image grids, never pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broker_schemas.errors import DataError
from broker_schemas.method.coordinates import CoordVocabulary

DEFAULT_SYSTEM_PROMPT: Final = "You find every object in an image."
DEFAULT_INSTRUCTION: Final = "List all objects with their place as one line of JSON."
IMAGE_TOKEN: Final = "<|image_pad|>"
END_TOKEN: Final = "<|im_end|>"

GridTHW = tuple[int, int, int]


class PromptBuilder:
    """Builds prompts for one model folder.

    ``tokenizer`` is a ``tokenizers.Tokenizer``, ``coord_vocab`` its coordinate tokens, ``end_token_id`` the
    id of ``<|im_end|>`` that closes a turn and stops generation, ``image_token_id`` that of
    ``<|image_pad|>``.
    Raises DataError for a folder without tokenizer, template, merge size, or one of the tokens.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        instruction: str = DEFAULT_INSTRUCTION,
    ) -> None:
        folder = Path(model_dir)
        self.tokenizer = load_tokenizer(folder)
        self.coord_vocab = CoordVocabulary.from_token_to_id(self.tokenizer.token_to_id)
        self.end_token_id = _token_id(self.tokenizer, END_TOKEN, folder)
        self.image_token_id = _token_id(self.tokenizer, IMAGE_TOKEN, folder)
        self.merge_size = _read_merge_size(folder)
        self.system_prompt = system_prompt
        self.instruction = instruction
        self._folder = folder
        self._template = _compile_template(_read_template(folder))
        self._special_tokens = _read_special_tokens(folder)
        self._ids_by_grids: dict[tuple[GridTHW, ...], NDArray[np.int32]] = {}

    def messages(self, num_images: int) -> list[dict[str, Any]]:
        """Return the chat: the system prompt unless it is empty, then the images before the instruction."""
        parts: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": self.instruction}]}
        if not self.system_prompt:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, user]

    def build_text(self, num_images: int = 1) -> str:
        """Return the rendered prompt up to where the assistant begins, one ``<|image_pad|>`` an image."""
        text = _render(self._template, self.messages(num_images), self._special_tokens, self._folder)
        if text.count(IMAGE_TOKEN) != num_images:
            raise DataError(
                f"{self._folder}: chat template wrote {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} for "
                f"{num_images} images, expected one each; use a Qwen vision-language model"
            )
        return text

    def build_ids(self, grids_thw: Sequence[GridTHW]) -> NDArray[np.int32]:
        """Return the prompt ids (P,) int32 with each image expanded to its number of image tokens.

        ``grids_thw``: (frames, rows, columns) of patches, an entry an image; empty: a prompt without image.
        Raises DataError for a grid that the merge size does not divide. The array is read-only and cached.
        """
        key = tuple((int(grid[0]), int(grid[1]), int(grid[2])) for grid in grids_thw)
        cached = self._ids_by_grids.get(key)
        if cached is None:
            cached = self._expand(key)
            cached.setflags(write=False)
            self._ids_by_grids[key] = cached
        return cached

    def _expand(self, grids_thw: tuple[GridTHW, ...]) -> NDArray[np.int32]:
        encoded = self.tokenizer.encode(self.build_text(len(grids_thw)), add_special_tokens=False).ids
        counts = iter(num_image_tokens(grid, self.merge_size) for grid in grids_thw)
        expanded: list[int] = []
        for token_id in encoded:
            expanded.extend([token_id] * (next(counts) if token_id == self.image_token_id else 1))
        return np.asarray(expanded, dtype=np.int32)


def num_image_tokens(grid_thw: GridTHW, merge_size: int) -> int:
    """Return the image tokens of a patch grid: its product over ``merge_size`` squared; raises DataError."""
    frames, rows, columns = grid_thw
    if min(grid_thw) < 1 or rows % merge_size or columns % merge_size:
        raise DataError(
            f"grid_thw: got {grid_thw}, expected positive numbers with rows and columns divisible by the "
            f"merge size {merge_size}; use the image processor of the same model folder"
        )
    return frames * rows * columns // merge_size**2


def load_tokenizer(model_dir: str | Path) -> Any:
    """Return the ``tokenizers.Tokenizer`` of a model folder; raises DataError where there is none."""
    from tokenizers import Tokenizer

    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{model_dir}: no tokenizer.json, expected a Hugging Face model folder on this machine; "
            "download the checkpoint and give its folder, or make one with 'rollstream model tiny'"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises a bare Exception for a broken file
        raise DataError(f"{path}: not a tokenizer file ({exc}); download or save it again") from exc


def _token_id(tokenizer: Any, text: str, folder: Path) -> int:
    token_id = tokenizer.token_to_id(text)
    if token_id is None:
        raise DataError(
            f"{folder}: token {text} is not in the tokenizer, expected a Qwen vision-language model"
        )
    return int(token_id)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: not readable as JSON ({exc}); download or save it again") from exc
    return content if isinstance(content, dict) else {}


def _read_merge_size(folder: Path) -> int:
    config = _read_json(folder / "config.json").get("vision_config", {})
    merge_size = _read_json(folder / "preprocessor_config.json").get("merge_size", 0)
    merge_size = merge_size or (config.get("spatial_merge_size", 0) if isinstance(config, dict) else 0)
    if not isinstance(merge_size, int) or merge_size < 1:
        raise DataError(
            f"{folder}: no merge_size in preprocessor_config.json and no vision_config.spatial_merge_size in "
            "config.json, expected a Qwen vision-language model"
        )
    return merge_size


def _read_template(folder: Path) -> str:
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # older folders keep several, by name
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    raise DataError(
        f"{folder}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; "
        "use an instruction-tuned checkpoint"
    )


def _read_special_tokens(folder: Path) -> dict[str, str]:
    config = _read_json(folder / "tokenizer_config.json")
    found = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _render(template: Any, messages: list[dict[str, Any]], tokens: dict[str, str], folder: Path) -> str:
    import jinja2

    try:
        return str(
            template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
            )
        )
    except jinja2.exceptions.TemplateError as exc:
        raise DataError(f"{folder}: chat template refuses the prompt: {exc}; use another checkpoint") from exc


def _compile_template(source: str) -> Any:
    # the settings are those of transformers: other whitespace handling would give other ids
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def refuse_date(pattern: str) -> None:
        # a prompt that depends on the day would differ between rollout and training
        raise jinja2.exceptions.TemplateError(f"asks for the date as {pattern!r}")

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = refuse_date
    return environment.from_string(source)
