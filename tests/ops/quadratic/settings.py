"""Settings of a case by their names, as the two types that the operators take."""

from typing import Any

from causalrn.ops.pairs import PairRule, PairTerms


def terms_and_rule(**settings: Any) -> tuple[PairTerms, PairRule]:
    terms = {name: settings.pop(name, None) for name in PairTerms._fields}
    return PairTerms(**terms), PairRule(**settings)
