"""Relatives of copying."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from datamodules.stream import IGNORE_INDEX
from datamodules.tasks.string_tasks import DuplicatedNgrams, PrefixLookup, Reverse, SuffixLookup
from datamodules.tasks.strings import EOS, SEP
from tests.datamodules.tasks.rows import rows_of


def test_reversed_strings() -> None:
    rows = rows_of(Reverse(), 9)
    strings = rows["tokens"][:, 1:10]
    assert np.array_equal(rows["targets"][:, 10:-1], strings[:, ::-1])
    assert (rows["targets"][:, -1] == EOS).all()


@pytest.mark.parametrize("length", [6, 30])
def test_duplicated_ngrams_stand_twice(length: int) -> None:
    rows = rows_of(DuplicatedNgrams(n_gram=3, alphabet_size=1000), length)
    for string in rows["tokens"][:, 1 : length + 1].tolist():
        counts = Counter(tuple(string[i : i + 3]) for i in range(length - 2))
        assert max(counts.values()) == 2
    assert np.array_equal(rows["targets"][:, length + 1 : -1], rows["tokens"][:, 1 : length + 1])


@pytest.mark.parametrize(("n_gram", "alphabet_size"), [(1, 30), (2, 5), (3, 26)])
@pytest.mark.parametrize("kind", [PrefixLookup, SuffixLookup])
def test_lookups_ask_for_an_ngram_that_occurs_once(kind: Any, n_gram: int, alphabet_size: int) -> None:
    length, answer_length = 24, 4
    rows = rows_of(kind(n_gram, answer_length, alphabet_size), length)
    starts = set()
    for tokens, targets in zip(rows["tokens"].tolist(), rows["targets"].tolist(), strict=True):
        first, second = tokens[1:].index(SEP) + 1, len(tokens) - answer_length
        if kind is PrefixLookup:
            ngram, string = tokens[1:first], tokens[first + 1 : second - 1]
            assert tokens[second - 1] == SEP
        else:
            string, ngram = tokens[1:first], tokens[first + 1 : second]
        assert (len(string), len(ngram)) == (length, n_gram)
        places = [i for i in range(length - n_gram + 1) if string[i : i + n_gram] == ngram]
        assert len(places) == 1
        starts.add(places[0])
        answer = string[places[0] + n_gram :][:answer_length]
        assert [target for target in targets if target != IGNORE_INDEX] == [*answer, EOS]
        assert tokens[second:] == answer
        assert targets.index(answer[0]) == second - 1
    assert len(starts) > 5
