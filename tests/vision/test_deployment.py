"""Folded, scripted and exported backbones compute what the trained ones do."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SMALL = {
    "chela_vit_tiny": {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5},
    "chela_former_s12": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "num_classes": 5},
}
NAMES = list(SMALL)
# fp32 through a few blocks, sums grouped differently.
FP32 = {"rtol": 1e-4, "atol": 1e-5}


def trained(name, **kwargs):
    """A model whose batch norms have seen images, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name], **kwargs).train()
    for _ in range(3):
        model(torch.randn(4, 3, 32, 48))
    return model.eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_folding_changes_the_parameters_and_not_the_outputs(name, image):
    model = trained(name)
    expected, before = model(image), sum(1 for _ in model.parameters())
    assert model.reparameterize() is model
    assert sum(1 for _ in model.parameters()) < before
    torch.testing.assert_close(model(image), expected, **FP32)


def test_timms_own_reparameterization_folds_too(image):
    model = trained("chela_vit_tiny")
    folded = timm.utils.reparameterize_model(model)
    assert folded.blocks[0].mixer.conv.folded and not model.blocks[0].mixer.conv.folded
    torch.testing.assert_close(folded(image), model(image), **FP32)


def test_a_model_in_training_mode_is_not_folded():
    with pytest.raises(RuntimeError, match="eval"):
        trained("chela_vit_tiny").train().reparameterize()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("switch", ["scriptable", "exportable"])
def test_timms_switches_keep_weights_and_outputs(name, switch, image):
    model, plain = trained(name), timm.create_model(name, **SMALL[name], **{switch: True}).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(image), model(image), **FP32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folded", [False, True])
def test_a_scriptable_model_is_scripted_saved_and_loaded(name, folded, image, tmp_path):
    model = trained(name, scriptable=True)
    expected = model(image)
    if folded:
        model.reparameterize()
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(image), expected, **FP32)


@pytest.mark.parametrize("mixer", ["conv", "attention", "chela(dims=1) + attention"])
def test_other_mixers_are_scripted_too(mixer, image):
    model = trained("chela_vit_tiny", scriptable=True, mixer=mixer)
    eager = trained("chela_vit_tiny", mixer=mixer)
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(torch.jit.script(model)(image), eager(image), **FP32)


def test_a_mixer_without_a_plain_form_cannot_be_scripted_and_says_so():
    with pytest.raises(TypeError, match="chela, conv or attention"):
        torch.jit.script(trained("chela_vit_tiny", scriptable=True, mixer="bidirectional(gla)"))


def test_a_scripted_model_takes_images_of_other_sizes():
    model = trained("chela_vit_tiny", scriptable=True, dynamic_img_size=True)
    scripted = torch.jit.script(model)
    for size in ((32, 48), (64, 24)):
        image = torch.randn(1, 3, *size)
        torch.testing.assert_close(scripted(image), model(image), **FP32)


def test_scripting_without_the_switch_says_what_to_do():
    with pytest.raises(TypeError, match="scriptable=True"):
        torch.jit.script(trained("chela_vit_tiny"))


# The dynamo exporter takes seconds a block: one model shows it.
@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in NAMES), ("chela_vit_tiny", True)])
def test_onnx_runtime_agrees(name, dynamo, image, tmp_path):
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="pip install 'chela-plugin[deploy]'")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'chela-plugin[deploy]'")
    model = trained(name, exportable=True)
    expected = copy.deepcopy(model)(image).detach()
    model.reparameterize()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (image,), str(path), dynamo=dynamo, input_names=["image"], verbose=False)
    (output,) = runtime.InferenceSession(str(path)).run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-3)  # other kernels, fp32


@pytest.mark.parametrize("name", NAMES)
def test_torch_export_takes_a_folded_model(name, image):
    model = trained(name).reparameterize()
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), model(image), **FP32)
