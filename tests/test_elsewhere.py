"""Backbones of timm, and weights of other toolkits: their own functions, under our names."""

import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from reidlib.extras import NORMALISATIONS, own_normalisation
from reidlib.look.maps import activation_maps
from reidlib.model.embed import embed
from reidlib.model.network import EmbeddingNet
from reidlib.model.weights import build_model, load_model, save_weights
from reidlib.recipes import make_recipe

TIMM = ("test_resnet", "test_convnext", "test_vit", "test_efficientnet")  # timm's own, tiny
IMAGES = torch.rand(4, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def recipe_of(backbone, weights="none", **changes):
    size = {"height": 64, "width": 32, "head": False}
    return make_recipe("trinet", backbone=backbone, weights=str(weights), **size | changes)


def trained(network):
    """Let a network's BatchNorms see images, so that its features depend on them."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            for values in (module.weight, module.bias):
                nn.init.uniform_(values, 0.1, 1)
    with torch.no_grad():
        network.train()(IMAGES)
    return network.eval()


def same_features(backbone, path, source, features, **changes):
    """The features of a source network, and those of ours with the weights in a file."""
    ours = build_model(recipe_of(backbone, path, **changes)).eval()
    with torch.no_grad():
        expected, found = features(source), ours(IMAGES)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max(), "images count"
    return torch.allclose(expected, found, atol=1e-5)


def save(network, path, **more):
    """Write a network as DataParallel scripts do."""
    state = {f"module.{k}": v for k, v in (network.state_dict() | more).items()}
    torch.save({"state_dict": state}, path)


# --- timm


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_gives_its_own_features(name, tmp_path):
    timm = pytest.importorskip("timm")
    options = {"img_size": (64, 32)} if "vit" in name else {}
    source = trained(timm.create_model(name, **options))
    save(source, tmp_path / "w.pth")

    def features(source):
        return source.forward_head(source.forward_features(IMAGES), pre_logits=True)

    assert same_features(f"timm:{name}", tmp_path / "w.pth", source, features)
    # … as a trained run, through a file, and image by image
    recipe = recipe_of(f"timm:{name}", tmp_path / "w.pth")
    save_weights(tmp_path / "m.safetensors", build_model(recipe), recipe)
    model, pixels = load_model(tmp_path / "m.safetensors"), (255 * IMAGES).byte()
    pixels = pixels.permute(0, 2, 3, 1).numpy()
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMALISATIONS[recipe.normalise])
    source.reset_classifier(0)
    with torch.no_grad():
        expected = source((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
    emb = embed(model, pixels, model.recipe, show_progress=False)
    np.testing.assert_allclose(emb, expected.numpy(), rtol=1e-3, atol=1e-4)
    assert activation_maps(model, pixels, recipe).shape[0] == 4


def test_the_last_stride_of_timms_networks():
    pytest.importorskip("timm")
    for name in ("test_resnet", "test_convnext", "test_efficientnet"):
        two, one = (EmbeddingNet(f"timm:{name}", last_stride=s).eval() for s in (2, 1))
        one.load_state_dict(two.state_dict())
        with torch.no_grad():
            maps = [net.backbone.forward_features(IMAGES).shape[2:] for net in (two, one)]
            assert maps == [(2, 1), (4, 2)] and one(IMAGES).shape == (4, 128)
    with pytest.raises(ValueError, match="timm:test_vit has no last stride"):
        EmbeddingNet("timm:test_vit", last_stride=1)


def test_every_normalisation_of_timm_can_be_said():
    timm = pytest.importorskip("timm")
    found = {own_normalisation(f"timm:{name}") for name in timm.list_pretrained()}
    assert found == {*NORMALISATIONS}
    assert make_recipe(backbone="timm:test_vit").normalise == "half"
    assert make_recipe(backbone="timm:test_vit", normalise="unit").normalise == "unit"
    assert make_recipe("plain", backbone="timm:test_vit").normalise == "unit"


def test_weights_of_a_vit_for_other_sizes_fit(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    tables = build_model(recipe_of("timm:test_vit", tmp_path / "w.pth")).backbone.pos_embed
    assert tables.shape == (1, 1 + 4 * 2, 64)


def test_pretrained_weights_come_from_the_hub(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    source = timm.create_model("test_resnet")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda place, file, **_: tmp_path / file)
    net = build_model(recipe_of("timm:test_resnet", "imagenet"))
    assert torch.equal(net.backbone.conv1[0].weight, source.conv1[0].weight)

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    message = r"hf-hub:timm/test_resnet\S* could not be had \(no network.*download its model.safe"
    with pytest.raises(RuntimeError, match=message):
        build_model(recipe_of("timm:test_resnet", "imagenet"))


CANNOT = [
    ({"backbone": "timm:resnet5O"}, "no model 'resnet5O'; did you mean 'resnet50' or"),
    ({"backbone": "timm:resnet50.a1_in1"}, "did you mean 'resnet50.a1_in1k'"),
    ({"height": 100}, "cannot take images of 100×32.*of 16 and 16, such as 96×32"),
    ({"backbone": "timm:deit_tiny_patch16_224", "width": 50}, "64×50.*64×48"),
    ({"weights": "w.pth"}, "do not fit timm:test_vit: the file lacks"),
]


@pytest.mark.parametrize(("settings", "message"), CANNOT)
def test_what_timm_cannot_do_is_named(data_root, settings, message):
    pytest.importorskip("timm")
    torch.save({"conv1.weight": torch.zeros(1)}, data_root / "w.pth")
    with pytest.raises(ValueError, match=message):
        build_model(recipe_of(**{"backbone": "timm:test_vit"} | settings))


def test_without_timm_the_recipe_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"timm:resnet50 needs .* timm\. .*pip install.*\[timm\]"
    for make in (lambda name: make_recipe(backbone=name), EmbeddingNet):
        with pytest.raises(RuntimeError, match=message):
            make("timm:resnet50")


# --- torchreid and fast-reid


class Block(nn.Module):
    """A block of torchreid's MobileNetV2, by its names."""

    def __init__(self, c, out, t, stride):
        super().__init__()
        self.conv1, self.dwconv2 = layer(c, c * t), layer(c * t, c * t, 3, stride, c * t)
        self.conv3 = nn.Sequential(nn.Conv2d(c * t, out, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = stride == 1 and c == out

    def forward(self, x):
        y = self.conv3(self.dwconv2(self.conv1(x)))
        return x + y if self.shortcut else y


def layer(c, out, kernel=1, stride=1, groups=1):
    conv = nn.Conv2d(c, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    named = nn.Sequential()
    named.conv, named.bn, named.relu = conv, nn.BatchNorm2d(out), nn.ReLU6()
    return named


def torchreid_mobilenet():
    network, c = nn.Sequential(), 32
    network.conv1 = layer(3, 32, 3, 2)
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    for i, (t, out, n, stride) in enumerate([*stages, (6, 160, 3, 2), (6, 320, 1, 1)], 2):
        blocks = [Block(c if j == 0 else out, out, t, stride if j == 0 else 1) for j in range(n)]
        setattr(network, f"conv{i}", nn.Sequential(*blocks))
        c = out
    network.conv9 = layer(320, 1280)
    return network


def pooled(network):
    return network(IMAGES).mean(dim=(2, 3))


def test_torchreids_mobilenet(tmp_path):
    source = trained(torchreid_mobilenet())
    save(source, tmp_path / "w.pth", **{"classifier.weight": torch.zeros(751, 1280)})
    assert same_features("mobilenet_v2_torchreid", tmp_path / "w.pth", source, pooled)
    with pytest.raises(ValueError, match="do not fit mobilenet_v2: the file lacks.*docs/runs.md"):
        build_model(recipe_of("mobilenet_v2", tmp_path / "w.pth"))


def test_fastreids_resnet_has_a_first_pooling_of_its_own(tmp_path):
    source = torchvision.models.resnet50()
    source.fc = source.avgpool = nn.Identity()
    source.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    # As fast-reid's checkpointer writes a model.
    state = {f"backbone.{k}": v for k, v in trained(source).state_dict().items()}
    state |= {"heads.bottleneck.0.weight": torch.ones(9), "heads.weight": torch.ones(751, 9)}
    state["pixel_mean"] = torch.ones(1, 3, 1, 1)
    torch.save({"model": state, "iteration": 9}, tmp_path / "w.pth")

    def features(source):
        return source(IMAGES).reshape(4, 2048, 2, 1).mean(dim=(2, 3))

    assert same_features("resnet50_fastreid", tmp_path / "w.pth", source, features)
    with pytest.warns(UserWarning, match='backbone = "resnet50_fastreid"'):
        assert not same_features("resnet50", tmp_path / "w.pth", source, features)


def test_fastreids_mobilenet(tmp_path):
    source = trained(torchvision.models.mobilenet_v2().features)
    theirs = {"0.0": 0, "0.1": 1, "1.0": 3, "1.1": 4, "2": 6, "3": 7}
    names = {
        f"{b}.conv.{k}.": f"features.{b}.conv.{i}." for b in range(2, 18) for k, i in theirs.items()
    }
    first = {"0.0": 0, "0.1": 1, "1": 3, "2": 4}
    names |= {f"1.conv.{k}.": f"features.1.conv.{i}." for k, i in first.items()}
    names |= {"18.0.": "conv.0.", "18.1.": "conv.1."}
    names |= {f"0.{i}.": f"features.0.{i}." for i in (0, 1)}
    state = {}
    for key, value in source.state_dict().items():
        start, leaf = key.rsplit(".", 1)
        state[f"backbone.{names[start + '.']}{leaf}"] = value
    torch.save({"model": state}, tmp_path / "w.pth")
    assert same_features("mobilenet_v2", tmp_path / "w.pth", source, pooled)
