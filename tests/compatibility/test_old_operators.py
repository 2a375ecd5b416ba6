"""Programs exported by doublehead 0.1.0 name its operators and their arguments: they stay."""

import json
from pathlib import Path

import pytest
import torch

import doublehead.ops  # noqa: F401  (defines the operators)

SCHEMAS = json.loads((Path(__file__).parent / "data" / "operators.json").read_text())


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_operator_takes_what_it_took(name):
    old = torch._C.parse_schema(SCHEMAS[name])
    now = getattr(torch.ops.doublehead, name).default._schema
    added = now.arguments[len(old.arguments) :]

    def described(values):
        return [(value.name, str(value.type), value.default_value, value.kwarg_only) for value in values]

    assert described(now.arguments[: len(old.arguments)]) == described(old.arguments)
    assert all(argument.has_default_value() for argument in added), "an old program does not give it"
    assert described(now.returns) == described(old.returns)
