"""The command `causalrn.doctor`."""

import json

import pytest

from causalrn import doctor


def test_it_tells_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--fast"])
    printed = capsys.readouterr().out
    found, _ = json.JSONDecoder().raw_decode(printed)
    assert found["packages"]["torch"]
    assert "cpu: " in printed
    assert "tokenizers (BPE tokenizers): there" in printed


def test_it_fails_where_an_operator_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.selfcheck, "main", lambda: 1)
    with pytest.raises(SystemExit) as exit_info:
        doctor.main([])
    assert exit_info.value.code == 1
    assert "compiled CPU kernels" in capsys.readouterr().out
