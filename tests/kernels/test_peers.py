"""Which of other packages' kernels are used, where none can run: on a CPU."""

import pytest
import torch

from chela_plugin import create_mixer
from chela_plugin.kernels import peers


def test_peers_run_on_cuda_in_sixteen_bits_only(monkeypatch):
    monkeypatch.setattr(peers, "find", lambda name: (len, ""))
    assert peers.peer("chunk_gla", "cuda", torch.bfloat16) is len
    assert peers.peer("chunk_gla", "cpu", torch.bfloat16) is None
    assert peers.peer("chunk_gla", "cuda", torch.float32) is None
    monkeypatch.setenv("CHELA_BACKEND", "reference")
    assert peers.peer("chunk_gla", "cuda", torch.bfloat16) is None


def test_a_peer_asked_for_by_name_and_missing_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(peers, "find", lambda name: (None, "fla is not installed"))
    assert peers.peer("chunk_gla", "cuda", torch.bfloat16) is None
    monkeypatch.setenv("CHELA_BACKEND", "peer")
    with pytest.raises(RuntimeError, match=r"fla\.ops\.gla\.chunk_gla can't be imported: fla is not installed"):
        peers.peer("chunk_gla", "cuda", torch.bfloat16)


def test_a_package_that_breaks_on_import_is_shown_and_passed_over(monkeypatch, tmp_path):
    (tmp_path / "broken_peer").mkdir()
    (tmp_path / "broken_peer" / "__init__.py").write_text("raise AttributeError('ffi')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(peers.HOMES, "broken", "broken_peer.ops")
    with pytest.warns(UserWarning, match=r"broken_peer.ops .* plain PyTorch runs \(AttributeError: ffi\)"):
        assert peers.find.__wrapped__("broken") == (None, "AttributeError: ffi")


def test_mamba_ssm_is_imported_past_its_own_front_door(mamba_ssm_without_extension):
    function, reason = peers.find.__wrapped__("mamba_chunk_scan_combined")
    assert reason == "" and function is not None and function() == "scan"
    with pytest.raises(ImportError, match="selective_scan_cuda"):
        import mamba_ssm  # noqa: F401


@pytest.mark.parametrize("spec", ["gla", "gated_deltanet", "mamba2", "mamba"])
def test_a_cpu_has_its_own_forms_even_where_peers_are_asked_for(spec, monkeypatch):
    monkeypatch.setenv("CHELA_BACKEND", "peer")
    module = create_mixer(spec, 64, causal=True)
    assert module.path("cpu") == "reference"
    module(torch.randn(1, 5, 64))
