"""Passkey retrieval: a number to be remembered, somewhere in a long text about other things."""

import numpy as np

from datamodules.order import Int64Array, derive_key, random_integers
from datamodules.ranges import check_range
from datamodules.tasks.strings import BOS, Rows, answer_rows, counters, framed
from datamodules.tasks.task import Task, check_at_least

# The texts are those of Landmark Attention (arXiv 2305.16300), which published the test first, shortened.
_FILLER = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_NEEDLE = b"The pass key is %s. Remember it. "
_QUESTION = b"What is the pass key? The pass key is "


class Passkey(Task):
    """Say the number that stands somewhere in a text of `length` bytes, when asked for it at the text's end.

    The text begins anywhere in the filler; tokens are UTF-8 bytes between BOS and EOS, whose ids no text contains.

    >>> task = Passkey(digits=3)
    >>> tokens, targets = task.example(length=125)
    >>> bytes(tokens[1:126]).decode()
    'and back again. The pass key is 162. Remember it. The grass is green. The sky is blue. What is the pass key? The pass key is '
    >>> bytes(tokens[126:]).decode(), tokens[0]
    ('162', 0)
    >>> bytes(targets[125:-1]).decode(), targets[-1], set(targets[:125])
    ('162', 2, {-100})

    Args:
        digits: of the number.

    Raises:
        ValueError: no digits.
    """

    name = "passkey"

    def __init__(self, digits: int = 5) -> None:
        check_range(self, "[1, inf)", digits=digits)
        self.digits = digits

    @property
    def vocab_size(self) -> int:
        return 256

    def settings(self) -> dict[str, int]:
        return {"digits": self.digits}

    @property
    def needle_length(self) -> int:
        return len(_NEEDLE) - len(b"%s") + self.digits

    def check_length(self, length: int) -> None:
        super().check_length(length)
        check_at_least(
            length, self.needle_length + len(_QUESTION), "bytes of the pass key's sentence and the question"
        )

    def positions(self, length: int) -> int:
        return 1 + length + self.digits

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        free = length - self.needle_length - len(_QUESTION)
        starts = random_integers(derive_key(int(key), "start"), ids, len(_FILLER))
        places = random_integers(derive_key(int(key), "place"), ids, free + 1)
        numbers = ord("0") + random_integers(key, counters(ids, self.digits), 10)
        endless = _FILLER * (2 + free // len(_FILLER))
        texts = []
        for start, place, number in zip(starts.tolist(), places.tolist(), numbers.tolist(), strict=True):
            needle = _NEEDLE % bytes(number)
            filler = endless[start : start + free]
            # The number stands before the sentence in which the place lies.
            place = filler.rfind(b". ", 0, place) + 2 if b". " in filler[:place] else 0
            texts.append(filler[:place] + needle + filler[place:] + _QUESTION)
        letters = np.frombuffer(b"".join(texts), dtype=np.uint8).reshape(len(ids), length)
        return answer_rows(framed(BOS, letters), numbers)
