"""`token_mixer` on fla's configs: which families take it, what is built, initialised, saved and loaded."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fla says that it found no GPU
    from fla import models
from transformers import AutoConfig, AutoModelForCausalLM

from chela_plugin import swap_mixers
from chela_plugin.lm.fla_mixer import FlaMixer
from chela_plugin.lm.fla_models import FAMILIES, REFUSED
from chela_plugin.registry import MixerSpec, MixerSpecError, UnknownMixerError, register_mixer

# Norms or a token shift of these are Triton kernels that no flag turns off: they are built here, and run on a GPU.
NEED_A_GPU = {"LogLinearMamba2Config", "Mamba2Config", "Mamba3Config", "MambaConfig", "RWKV6Config", "SambaConfig"}


class Windowed(nn.Module):
    """A third party's mixer: a Linear drawn its own way, and a buffer that no checkpoint holds."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(dim, dim, device=device, dtype=dtype)
        nn.init.constant_(self.linear.weight, 5.0)
        nn.init.constant_(self.linear.bias, 7.0)
        self.register_buffer("window", torch.linspace(0, 1, dim, device=device), persistent=False)

    def forward(self, x, *, attention_mask=None, cu_seqlens=None, cache=None, grid=None):
        return self.linear(x * self.window)


def windowed(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
    """Test mixer."""
    return Windowed(dim, device=device, dtype=dtype)


register_mixer("windowed_in_fla", windowed)


def tiny_config(name, token_mixer, **options):
    """The config class `name` with everything small and every fused kernel off, as a CPU needs it."""
    config_class = getattr(models, name)
    fused = {key: False for key in inspect.signature(config_class.__init__).parameters if key.startswith("fuse_")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "pad_token_id": 0}
    return config_class(token_mixer=token_mixer, **(fused | sizes | options))


def tiny_model(token_mixer, name="TransformerConfig", **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name, token_mixer, **options)).eval()


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


def mixers(model):
    return [module for module in model.modules() if isinstance(module, FlaMixer)]


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_family_that_fla_exports_stands_in_one_row():
    exported = {name for name in models.__all__ if name.endswith("Config")}
    assert not FAMILIES.keys() & REFUSED.keys()
    assert exported == FAMILIES.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_supported_family_runs_and_comes_back_from_disk_bit_for_bit(name, tmp_path):
    model = tiny_model("conv(long=none) + linear_attention", name)
    held = [mixer.spec.name for mixer in mixers(model)]
    assert held == ["conv", "linear_attention"]
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(model) and back.config.token_mixer == "conv(long=none) + linear_attention"
    assert same_tensors(model, back)
    if name in NEED_A_GPU:
        return
    ids = tokens(2, 7)
    with torch.no_grad():  # equal weights, at addresses aligned otherwise: vectorised sums may differ in the last bit
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in mixers(model) for p in m.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_says_why(name):
    with pytest.raises(ValueError, match=f"{name} takes no token_mixer: its "):
        getattr(models, name)(token_mixer="chela")
    assert getattr(models, name)().token_mixer is None


def test_a_family_that_fla_adds_is_refused_until_it_is_known():
    from chela_plugin.lm.fla_models import TokenMixer

    class NewConfig:
        token_mixer = TokenMixer("NewConfig", "this version of chela-plugin doesn't know the family")

    with pytest.raises(ValueError, match="doesn't know the family"):
        NewConfig().token_mixer = "chela"


def test_native_keeps_the_familys_own_mixer():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("GLAConfig", "chela + native", num_heads=1))
    kinds = [type(layer.attn).__name__ for layer in model.model.layers]
    assert kinds == ["FlaMixer", "GatedLinearAttention"]


@pytest.mark.parametrize("token_mixer", [None, "native"])
def test_without_a_mixer_of_ours_the_model_is_the_one_that_fla_builds(token_mixer):
    def build(**options):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config("GLAConfig", num_heads=1, **options))

    plain, same = build(token_mixer=None), build(token_mixer=token_mixer)
    assert same_tensors(plain, same)
    assert "token_mixer" not in plain.config.to_dict() and "token_mixer" not in plain.config.to_diff_dict()


def test_the_pattern_wins_over_flas_own_hybrid_setting():
    attn = {"layers": [0, 1], "num_heads": 2}
    model = tiny_model("conv", "GLAConfig", attn=attn)
    assert len(mixers(model)) == 2


def test_the_string_is_kept_in_its_canonical_form(tmp_path):
    config = tiny_config("GLAConfig", " chela( long : modal)+2*conv ")
    assert config.token_mixer == "chela(long=modal) + 2*conv"
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).token_mixer == config.token_mixer
    assert copy.deepcopy(config).token_mixer == pickle.loads(pickle.dumps(config)).token_mixer == config.token_mixer
    config.token_mixer = None
    assert "token_mixer" not in config.to_dict()


@pytest.mark.parametrize("name", ["TransformerConfig", "GLAConfig"])
def test_mixers_come_out_initialised_as_they_ask_to_be(name):
    # 99 stands out: fla draws every Linear of its own from it.
    model = AutoModelForCausalLM.from_config(tiny_config(name, "windowed_in_fla + chela", initializer_range=99.0))
    windowed, chela = (mixer.mixer for mixer in mixers(model))
    assert (windowed.linear.weight == 5).all() and (windowed.linear.bias == 7).all()
    assert chela.q.weight.abs().max() < 5
    assert model.model.layers[0].mlp.down_proj.weight.abs().max() > 50


def test_what_a_checkpoint_lacks_is_filled_as_in_a_new_mixer():
    model = tiny_model("windowed_in_fla + windowed_in_fla")
    kept = {k: v for k, v in model.state_dict().items() if "layers.1.attn" not in k}
    kept["model.layers.0.attn.mixer.linear.weight"] = torch.full((32, 32), 2.0)
    back = type(model).from_pretrained(None, config=model.config, state_dict=kept)
    for mixer, value in zip(mixers(back), (2, 5), strict=True):
        assert (mixer.mixer.linear.weight == value).all() and (mixer.mixer.linear.bias == 7).all()
        assert torch.equal(mixer.mixer.window, torch.linspace(0, 1, 32))  # no checkpoint holds it


def test_a_model_built_on_meta_and_then_given_storage_is_initialised_by_post_init():
    """As fla's training framework does it, before sharding and after."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("GLAConfig", "windowed_in_fla + chela"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1000)
    for module in model.modules():
        module._is_hf_initialized = False
    model.post_init()
    windowed, chela = (mixer.mixer for mixer in mixers(model))
    assert (windowed.linear.weight == 5).all() and torch.equal(windowed.window, torch.linspace(0, 1, 32))
    assert all(p.abs().max() < 100 for p in model.parameters())
    assert (chela.head_norm == 1).all() and chela.conv.scales[-1].unique().item() == pytest.approx(chela.conv.long_gain)


def test_sharded_parameters_are_filled_too(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            mixer = FlaMixer(MixerSpec.parse("windowed_in_fla"), 32, depth=1, layer_idx=0)
        fully_shard(mixer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        mixer.to_empty(device="cpu")
        mixer.reset_parameters()
        assert (mixer.mixer.linear.weight.full_tensor() == 5).all()
    finally:
        dist.destroy_process_group()


def test_a_model_can_be_loaded_in_half_precision(tmp_path):
    tiny_model("chela").save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert back(tokens(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("chelaa", "did you mean 'chela'"),
        ("chela(long=modal", "never closed"),
        ("chela(no_such=1)", "no_such"),
        (3, "a mixer string is a str"),
    ],
)
def test_a_bad_pattern_is_an_error_of_the_config(pattern, message):
    with pytest.raises((MixerSpecError, TypeError), match=message):
        models.GLAConfig(token_mixer=pattern)


def test_a_bidirectional_mixer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"bidirectional\(mamba2\).*causal"):
        tiny_model("chela + bidirectional(mamba2)")


def test_a_mixer_that_refuses_the_width_names_itself():
    with pytest.raises(ValueError, match=r"chela\(num_heads=5\): dim 32 is not divisible by num_heads 5"):
        tiny_model("chela(num_heads=5)")


def rewrite(folder, **entries):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | entries, sort_keys=True))


def test_a_checkpoint_of_a_mixer_that_is_not_installed_says_what_to_install(tmp_path):
    tiny_model("conv").save_pretrained(tmp_path)
    assert "mixer_distributions" not in json.loads((tmp_path / "config.json").read_text())  # conv is ours
    rewrite(tmp_path, token_mixer="conv + elsewhere", mixer_distributions={"elsewhere": "else-where"})
    with pytest.raises(UnknownMixerError, match=r"distribution else-where.*pip install else-where"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_a_mixer_registered_at_run_time_says_so(tmp_path):
    tiny_model("windowed_in_fla").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer_distributions"] == {"windowed_in_fla": ""}
    rewrite(tmp_path, token_mixer="elsewhere", mixer_distributions={"elsewhere": ""})
    with pytest.raises(UnknownMixerError, match="register_mixer by the program that saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_with_another_mixer_is_no_silent_success(tmp_path):
    model = tiny_model("conv")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, token_mixer="attention")


def test_a_model_that_is_built_already_can_be_swapped_and_its_config_follows(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("GLAConfig", None, num_heads=1)).eval()
    assert swap_mixers(model, "native + conv") == 1
    assert model.config.token_mixer == "native + conv"
    assert swap_mixers(model, "chela + native") == 1
    assert model.config.token_mixer == "chela + conv"
    model.save_pretrained(tmp_path)
    assert same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert model(tokens(2, 5)).logits.shape == (2, 5, 61)


def test_swapped_mixers_take_the_dtype_and_place_of_the_old():
    model = AutoModelForCausalLM.from_config(tiny_config("GLAConfig", None, num_heads=1), dtype=torch.bfloat16)
    swap_mixers(model, "chela")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [(mixer.depth, mixer.layer_idx) for mixer in mixers(model)] == [(2, 0), (2, 1)]


def test_a_model_of_a_refused_family_cannot_be_swapped():
    with torch.device("meta"):
        model = models.RWKV7Model(tiny_config("RWKV7Config", None, head_dim=32))
    with pytest.raises(ValueError, match="RWKV7Model takes no mixer of ours: its blocks expect a fourth value"):
        swap_mixers(model, "chela")


def run(program, **environment):
    """Standard output of `program` in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["", "import transformers"])
def test_no_import_of_ours_is_needed(first):
    program = f"""
        {first}
        from fla.models import TransformerConfig
        from transformers import AutoModelForCausalLM
        config = TransformerConfig(hidden_size=32, num_hidden_layers=1, vocab_size=9, token_mixer="conv")
        print(AutoModelForCausalLM.from_config(config).model.layers[0].attn)
    """
    assert run(program).startswith("FlaMixer(\n  conv\n")


def test_lm_evals_loading_calls_find_a_saved_model_with_no_import_of_ours(tmp_path):
    """What `lm_eval --model hf` does (lm-evaluation-harness, lm_eval/models/huggingface.py)."""
    from chela_plugin.lm import ChelaConfig, ChelaForCausalLM

    ChelaForCausalLM(ChelaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=61)).save_pretrained(tmp_path)
    program = f"""
        import torch, transformers
        path = {str(tmp_path)!r}
        config = transformers.AutoConfig.from_pretrained(path, revision="main", trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, revision="main", dtype="auto", trust_remote_code=False, device_map=None
        ).eval()
        with torch.no_grad():
            print(config.model_type, type(model).__name__, tuple(model(torch.arange(9)[None]).logits.shape))
    """
    assert run(program) == "chela ChelaForCausalLM (1, 9, 61)"
