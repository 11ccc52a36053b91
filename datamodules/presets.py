"""Standard corpora: where their files come from, their hashes, and their standard splits."""

from pathlib import Path

from datamodules.documents import Span
from datamodules.packing import PackSettings
from datamodules.preparation import Plan
from datamodules.tokenizers import ByteTokenizer

STATE_OF_THE_UNION = Path(__file__).parent / "corpora" / "state_of_the_union.jsonl.xz"


def state_of_the_union() -> Plan:
    """The 249 addresses that ship with this package, split by document."""
    settings = PackSettings(tokenizer=ByteTokenizer().describe())
    return Plan([[Span(str(STATE_OF_THE_UNION))]], settings, {"preset": "state_of_the_union"})
