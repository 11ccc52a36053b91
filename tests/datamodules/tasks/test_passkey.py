"""The pass key and its text."""

from datamodules.tasks.passkey import Passkey
from datamodules.tasks.strings import EOS
from tests.datamodules.tasks.rows import rows_of


def test_the_pass_key_stands_in_the_text_once() -> None:
    shortest = len("The pass key is 12345. Remember it. What is the pass key? The pass key is ")
    for length in (shortest, 500):
        rows = rows_of(Passkey(), length)
        places = set()
        for tokens, targets in zip(rows["tokens"].tolist(), rows["targets"].tolist(), strict=True):
            text, number = bytes(tokens[1 : length + 1]).decode(), bytes(tokens[length + 1 :]).decode()
            assert text.count(f"The pass key is {number}. Remember it. ") == 1
            assert text.endswith("What is the pass key? The pass key is ")
            assert targets[length:] == [*number.encode(), EOS]
            places.add(text.index("The pass key"))
        assert len(places) > (5 if length == 500 else 0)
