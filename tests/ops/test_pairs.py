"""The settings of a pair travel as two types: no signature spells them out."""

import ast

import torch

from causalrn.ops.pairs import SCHEMA, PairRule, PairTerms, from_schema
from tests import ROOT

SETTINGS = {*PairTerms._fields, *PairRule._fields}


def test_no_signature_spells_out_all_settings() -> None:
    read = 0
    for path in sorted((ROOT / "causalrn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = {x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
                assert not names >= SETTINGS, f"{path}: {node.name}"
                read += names >= {"terms", "rule"}
    # The operators, their definitions and kernels.
    assert read > 10


def test_the_schema_holds_the_fields_in_their_order() -> None:
    assert [argument.split()[1] for argument in SCHEMA.split(", ")] == [*PairTerms._fields, *PairRule._fields]
    terms, rule = PairTerms(torch.ones(2, 1), slope=torch.ones(1)), PairRule(0.1, False, "rms", "gelu")
    assert from_schema(*terms, *rule) == (terms, rule)
