"""How does text become the token ids of transformers' CLIPTokenizer, without transformers?

CLIP's words (Radford et al. 2021): letters in a row, one digit, or other signs in a row, lower
case; each is split by byte-pair merges (Sennrich et al. 2016), and its last part ends in `</w>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from latentdiff.lean.weights import Unsupported, read_json

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_DEFAULTS: dict[str, Any] = {
    "bos_token": _BEGIN,
    "eos_token": _END,
    "unk_token": _END,
    "pad_token": _END,
}
# transformers gives new special tokens their ids in this order
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_SPECIAL += ("mask_token",)
_DEFAULT_LENGTH = 77
_LONGEST = 1_000_000  # a larger model_max_length means none: transformers writes 1e30


class LeanTokenizer:
    """Text -> token ids.

    Attributes:
        context_length: tokens of a prompt, begin and end included.
        bos_id: the token that begins a prompt.
        eos_id: the token that ends it.
        pad_id: what stands behind the end.
    """

    def __init__(
        self, backend: Tokenizer, context_length: int, bos_id: int, eos_id: int, pad_id: int
    ) -> None:
        self.context_length = context_length
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self._backend = backend

    @classmethod
    def load(cls, directory: Path, context_length: int | None = None) -> LeanTokenizer:
        """Open a CLIPTokenizer's directory: tokenizer.json, or vocab.json and merges.txt.

        Args:
            directory: with tokenizer_config.json, special_tokens_map.json and added_tokens.json
                where there are such.
            context_length: tokens of a prompt; default: tokenizer_config.json's model_max_length.

        Raises:
            Unsupported: its settings are none that CLIP's tokenizers have.
            ValueError: a file is damaged or missing.
        """
        whole = directory / "tokenizer.json"
        described = read_json(whole) if whole.is_file() else None
        settings = _settings(directory, described)
        if reason := _why_not(settings, described):
            raise Unsupported(f"{directory}: {reason}")
        backend = Tokenizer(_merges(directory, described, str(settings["unk_token"])))
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.add_tokens(_added(settings))
        ends = {name: _id(backend, directory, settings, name) for name in _DEFAULTS}
        if reason := _why_not_ends(described, ends["bos_token"], ends["eos_token"]):
            raise Unsupported(f"{directory}: {reason}")
        if context_length is None:
            longest = settings.get("model_max_length") or _LONGEST
            context_length = int(longest) if longest < _LONGEST else _DEFAULT_LENGTH
        return cls(backend, context_length, ends["bos_token"], ends["eos_token"], ends["pad_token"])

    @property
    def largest_id(self) -> int:
        """The largest id that a text may get."""
        return max(self._backend.get_vocab().values())

    def ids(self, text: str) -> list[int]:
        """A text's tokens, however many, without begin, end and padding.

        Raises:
            ValueError: it is no Unicode text.
        """
        return self._ids([text])[0]

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids int64 [b, context_length], padded; what is too long is cut.

        Raises:
            ValueError: a prompt is no Unicode text.
        """
        rows = torch.full((len(prompts), self.context_length), self.pad_id)
        for row, ids in zip(rows, self._ids(list(prompts)), strict=True):
            whole = [self.bos_id, *ids[: self.context_length - 2], self.eos_id]
            row[: len(whole)] = torch.tensor(whole)
        return rows

    def _ids(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"prompt {text!r} is no Unicode text ({error.reason}); expected UTF-8"
                ) from error
        return [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=False)]


def _settings(directory: Path, described: Mapping[str, Any] | None) -> dict[str, Any]:
    """tokenizer_config.json and what else says which tokens are special, `added` among it by id."""
    path = directory / "tokenizer_config.json"
    settings = _DEFAULTS | (read_json(path) if path.is_file() else {})
    if "added_tokens_decoder" in settings:
        added = {int(i): _token(t) for i, t in settings["added_tokens_decoder"].items()}
        return _named(settings) | {"added": added}
    path = directory / "special_tokens_map.json"
    settings = _named(settings | (read_json(path) if path.is_file() else {}))
    added = {}
    path = directory / "added_tokens.json"
    named = _names(settings)
    for text, i in (read_json(path) if path.is_file() else {}).items():
        added[i] = AddedToken(text, normalized=text not in named, special=text in named)
    for token in (described or {}).get("added_tokens", ()):
        added[token["id"]] = _token(token)
    return settings | {"added": added}


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same, special tokens as AddedToken where more than their text is given."""
    return {
        name: _token(value, special=True) if name in _SPECIAL and isinstance(value, dict) else value
        for name, value in settings.items()
    }


def _token(described: Mapping[str, Any], special: bool | None = None) -> AddedToken:
    known = ("single_word", "lstrip", "rstrip", "normalized", "special")
    options = {name: described[name] for name in known if name in described}
    if special is not None:
        options["special"] = special
    return AddedToken(described["content"], **options)


def _added(settings: Mapping[str, Any]) -> list[AddedToken]:
    """All tokens that are found in a text before it is split into words, in the order of ids."""
    tokens = [token for _, token in sorted(settings["added"].items())]
    known = {str(token) for token in tokens}
    named: list[str | AddedToken] = []
    for name in _SPECIAL:
        value = settings.get(name)
        # of one text told in two ways, transformers and so we add both: the last one holds
        if value is not None and str(value) not in known and value not in named:
            named.append(value)
    tokens += [AddedToken(t, special=True) if isinstance(t, str) else t for t in named]
    for token in tokens:
        token.special = token.special or str(token) in _names(settings)
    return tokens


def _merges(directory: Path, described: Mapping[str, Any] | None, unknown: str) -> models.BPE:
    """The vocabulary and its byte-pair merges.

    Raises:
        ValueError: a file is damaged or missing.
    """
    options: dict[str, Any] = dict(
        continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False, unk_token=unknown
    )
    place = directory / "tokenizer.json"
    try:
        if described is None:
            files = [directory / "vocab.json", directory / "merges.txt"]
            for place in files:
                if not place.is_file():
                    raise ValueError("no such file")
            return models.BPE.from_file(*map(str, files), **options)
        model = described["model"]
        pairs = [_pair(merge) for merge in model["merges"]]
        return models.BPE(vocab=model["vocab"], merges=pairs, **options)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(
            f"{place} is not a tokenizer's ({error}); expected byte-pair merges, in tokenizer.json "
            "or in vocab.json and merges.txt; copy the directory again"
        ) from error


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _id(backend: Tokenizer, directory: Path, settings: Mapping[str, Any], name: str) -> int:
    found = backend.token_to_id(str(settings[name]))
    if found is None:
        raise ValueError(
            f"{directory} has no {name} {settings[name]} among its tokens; copy the directory again"
        )
    return found


def _why_not(settings: Mapping[str, Any], described: Mapping[str, Any] | None) -> str | None:
    """What transformers would do with these settings and we do not; None if there is nothing."""
    for name in ("padding_side", "truncation_side"):
        if settings.get(name, "right") != "right":
            return f"{name} is {settings[name]}; supported: right"
    own = [name for name in settings if name.endswith("_token") and isinstance(settings[name], str)]
    reasons = [name for name in own if name not in _SPECIAL]
    reasons += [
        name
        for name in ("additional_special_tokens", "extra_special_tokens", "split_special_tokens")
        if settings.get(name)
    ]
    if described is None:
        reasons += [name for name in ("add_bos_token", "add_eos_token") if name in settings]
    elif described.get("model", {}).get("type", "BPE") != "BPE":
        reasons += [f"model.type {described['model']['type']}"]
    return f"{reasons[0]} is set, which is not supported" if reasons else None


def _why_not_ends(described: Mapping[str, Any] | None, bos_id: int, eos_id: int) -> str | None:
    """Whether a prompt gets another begin or end than these two tokens."""
    ends = (described or {}).get("post_processor")
    if ends is None:
        return None
    if ends.get("type") != "RobertaProcessing":
        return f"post_processor {ends.get('type')} is not supported; supported: RobertaProcessing"
    if (ends["cls"][1], ends["sep"][1]) != (bos_id, eos_id):
        return f"post_processor puts {ends['cls']} and {ends['sep']} around a prompt"
    return None


def _names(settings: Mapping[str, Any]) -> set[str]:
    """The special tokens' texts."""
    return {str(settings[name]) for name in _SPECIAL if settings.get(name) is not None}
