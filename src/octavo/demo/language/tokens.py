"""The tokenizer of the demo language model: byte pairs that know a line break with its indentation as one thing."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
_PIECE = r"\n *| ?[A-Za-z]+|_+| ?[0-9]{1,3}| ?[^\sA-Za-z_0-9]+|\s+"
_RAREST = 2


def build_tokenizer(texts: Iterable[str], *, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer that ``texts`` teach; every process numbers its tokens alike."""
    merges = learn_merges(_count_pieces(texts), VOCABULARY_SIZE - len(_alphabet()) - 1)
    tokens = [*_alphabet(), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), END_OF_TEXT]
    tokenizer = Tokenizer(models.BPE(vocab={token: k for k, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECE), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=context
    )


def learn_merges(pieces: Counter[str], count: int) -> list[tuple[str, str]]:
    """The ``count`` most useful merges, in order.

    Byte-pair encoding (Sennrich et al., arXiv:1508.07909). Of pairs that are as frequent the first in the alphabet
    wins, and only the pieces that hold the merged pair are counted anew.

    >>> learn_merges(Counter({"aab": 3, "ab": 1}), 2)
    [('a', 'b'), ('a', 'ab')]
    """
    words = [(list(piece), number) for piece, number in pieces.items()]
    pairs: Counter[tuple[str, str]] = Counter()
    holders: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (parts, number) in enumerate(words):
        for pair in pairwise(parts):
            pairs[pair] += number
            holders[pair].add(index)
    merges: list[tuple[str, str]] = []
    while len(merges) < count and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < _RAREST:
            break
        merges.append(best)
        for index in holders.pop(best):
            _merge_in(words[index], best, index, pairs, holders)
        del pairs[best]
    return merges


def _merge_in(
    word: tuple[list[str], int],
    best: tuple[str, str],
    index: int,
    pairs: Counter[tuple[str, str]],
    holders: dict[tuple[str, str], set[int]],
) -> None:
    """Replace ``best`` in one piece, and count its pairs anew."""
    parts, number = word
    for pair in pairwise(parts):
        pairs[pair] -= number
    k = 0
    while k < len(parts) - 1:
        if (parts[k], parts[k + 1]) == best:
            parts[k : k + 2] = ["".join(best)]
        k += 1
    for pair in pairwise(parts):
        pairs[pair] += number
        holders[pair].add(index)


def _count_pieces(texts: Iterable[str]) -> Counter[str]:
    """How often each piece occurs, spelt in the alphabet of byte-level tokenizers."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(_PIECE, text))
    letters = pre_tokenizers.ByteLevel(False, use_regex=False)
    return Counter(
        {letters.pre_tokenize_str(piece)[0][0]: number for piece, number in counts.items() if number >= _RAREST}
    )


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())
