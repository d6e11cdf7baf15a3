"""The embedding network: shapes, strides, heads, and weights that fit or do not."""

import copy
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from reidlib.model.depthwise import StridedDepthwise, quicken_depthwise
from reidlib.model.embed import folded
from reidlib.model.network import BACKBONES, EmbeddingNet
from reidlib.model.weights import build_model
from reidlib.recipes import make_recipe


def pretrained(backbone, weights):
    return build_model(make_recipe(backbone=backbone, weights=str(weights)))


@pytest.fixture(scope="module", params=BACKBONES)
def net(request):
    """One of each backbone, with statistics and weights as if it had been trained."""
    net = EmbeddingNet(request.param)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight.data):
                values.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return net


def test_last_stride_1_doubles_the_feature_map_and_keeps_the_weights(net, request):
    backbone = request.node.callspec.params["net"]
    one, x = EmbeddingNet(backbone, last_stride=1).eval(), torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        height, width = net.eval().backbone(x).shape[2:]
        assert (height, width) == ((4, 2) if backbone == "resnet8" else (2, 1))
        assert one.backbone(x).shape[2:] == (2 * height, 2 * width)
        assert [*one.state_dict()] == [*net.state_dict()]
        one.load_state_dict(net.state_dict())
        assert one(x).shape == (2, 128)


def test_the_network_is_trinet():
    net = EmbeddingNet()
    assert [type(m) for m in net.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert net.head[0].weight.shape == (1024, 2048) and net.head[3].weight.shape == (128, 1024)
    reference = torchvision.models.resnet50()
    names = [k for k in reference.state_dict() if not k.startswith("fc.")]
    assert [*net.backbone.state_dict()] == names
    # the same function as torchvision's own network up to its pooling
    reference.load_state_dict({**reference.state_dict(), **net.backbone.state_dict()})
    reference.fc = nn.Identity()
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        pooled = net.eval().backbone(x).mean((2, 3))
        torch.testing.assert_close(pooled, reference.eval()(x))
        torch.testing.assert_close(net(x), net.head(pooled))
        bare = EmbeddingNet("resnet18", head=False).eval()
        torch.testing.assert_close(bare(x), bare.backbone(x).mean((2, 3)))
    assert bare.dim == 512


def test_pooling_of_a_power_is_the_mean_of_powers():
    net = EmbeddingNet("resnet8", head=False, pooling_power=3.0).eval()
    with torch.no_grad():
        x = torch.rand(2, 3, 64, 32)
        maps, pooled = net.backbone(x).double().numpy(), net(x)
    expected = [[(sum(v**3 for v in m.flat) / m.size) ** (1 / 3) for m in image] for image in maps]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(pooled, maps.mean((2, 3)), rtol=0.1)
    with torch.no_grad():  # a channel that is 0 everywhere has a gradient that is finite
        list(net.backbone.modules())[-1].weight.zero_()
    net(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("head", [True, False])
def test_batchnorm_stands_between_pooling_and_head(head):
    net = EmbeddingNet("resnet8", head=head, norm=True).train()
    emb = net(x := torch.rand(6, 3, 64, 32))
    pooled = net.pooled(x)
    torch.testing.assert_close(pooled, net.backbone(x).mean((2, 3)))
    normed = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(emb, net.head(normed))
    assert set(net.state_dict()) - set(EmbeddingNet("resnet8", head=head).state_dict()) == {
        f"norm.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, (2, 1)), (3, 3)])
@pytest.mark.parametrize("size", [(8, 4), (7, 5), (2, 1)])
def test_the_strided_depthwise_gradient_is_pytorchs(kernel, stride, size):
    plain = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=False).double()
    quick = copy.deepcopy(nn.Sequential(plain))
    quicken_depthwise(quick)
    assert type(quick[0]) is StridedDepthwise and quick[0].weight.equal(plain.weight)
    x = torch.rand(3, 6, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = quick(x), plain(x)
    gradient = torch.rand_like(theirs)
    ours = (ours, *torch.autograd.grad(ours, [x, quick[0].weight], gradient))
    theirs = (theirs, *torch.autograd.grad(theirs, [x, plain.weight], gradient))
    assert all(value.abs().sum() > 0 for value in theirs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "change", [{"stride": 1}, {"groups": 3}, {"bias": True}, {"dilation": 2}, {"padding": 0}]
)
def test_other_convolutions_stay_as_they_are(change):
    settings = {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 6, "bias": False} | change
    network = nn.Sequential(nn.Conv2d(6, 6, **settings))
    quicken_depthwise(network)
    assert type(network[0]) is nn.Conv2d


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_small"])
def test_a_mobilenets_gradients_are_torchvisions(backbone):
    """All strided depthwise convolutions are replaced, and nothing else changes, in bfloat16 too."""
    net = EmbeddingNet(backbone).backbone
    strided = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert [type(m) for m in strided] == [nn.Conv2d] + [StridedDepthwise] * (len(strided) - 1)
    assert len(strided) > 3
    reference = nn.Sequential()
    reference.features = BACKBONES[backbone]().features
    reference.load_state_dict(net.state_dict())
    x = torch.rand(4, 3, 96, 64).contiguous(memory_format=torch.channels_last)
    for autocast, tolerance in ((False, 1e-4), (True, 0.05)):
        sides = []
        for model in (net, reference):
            model.to(memory_format=torch.channels_last).eval()  # eval: no batch statistics
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(x)
            gradients = torch.autograd.grad(out.float().square().mean(), [*model.parameters()])
            sides.append(torch.cat([g.flatten() for g in gradients]))
        assert sides[1].norm() > 0
        assert (sides[0] - sides[1]).norm() <= tolerance * sides[1].norm()


def test_folding_batch_norm_changes_no_output(net):
    before = {k: v.clone() for k, v in net.train().state_dict().items()}
    fold = folded(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold.modules())
    assert net.training and not fold.training
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        expected = net.eval()(x)
        assert (fold(x) - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(fold(x), expected)  # with gradients, too
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "resnet18"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_load_from_a_file(tmp_path, backbone, suffix):
    path, state = tmp_path / f"weights{suffix}", BACKBONES[backbone]().state_dict()
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:  # as DataParallel training scripts save them
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    net = pretrained(backbone, path)
    for key, value in net.backbone.state_dict().items():
        assert torch.equal(value, state[key])
    assert not torch.equal(next(EmbeddingNet(backbone).parameters()), next(net.parameters()))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="weights.* cannot be read"):
        pretrained(backbone, path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"weights{suffix}.*give a path"):
        pretrained(backbone, path)


# fmt: off
CHANGES = [
    ({}, None),
    ({"features.9.block.0.0.weight": None}, "lacks 1 of its .* keys: features.9.block.0.0.weig"),
    ({"layer9.weight": torch.zeros(1)}, "unknown 1 .*layer9.weight"),
    ({"features.0.0.weight": torch.zeros(16, 1, 3, 3)}, "shapes in 1 .*features.0.0.weight"),
    ({"features.0.1.running_var": torch.full((16,), torch.nan)}, "NaN or infinity in 1 .*var"),
    *(({"features.0.1.weight": torch.ones(16, dtype=kind)}, "no floating-point numbers in 1 .*t")
      for kind in (torch.int8, torch.bool, torch.complex64)),
]
# fmt: on


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_file_that_does_not_fit_says_which_keys(data_root, change, message):
    """It lies in the data folder, where relative names are looked for, too."""
    state = torchvision.models.mobilenet_v3_small().state_dict() | change
    torch.save({k: v for k, v in state.items() if v is not None}, data_root / "a.pth")
    if message:
        with pytest.raises(ValueError, match=message):
            pretrained("mobilenet_v3_small", "a.pth")
    else:
        assert pretrained("mobilenet_v3_small", "a.pth")
        with pytest.raises(ValueError, match="do not fit mobilenet_v2: the file lacks"):
            pretrained("mobilenet_v2", "a.pth")


class Evil:
    """Ends the program when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


CODE = [
    ({"conv1.weight": Evil()}, r"cannot be read as a file of weights: it holds \S*exec beside"),
    ({"rank1": np.float64(0.9)}, r"holds numpy\S*scalar beside tensors.* save the network alone"),
    ([1, 2], "no state dict"),
    ({0: torch.zeros(1)}, "no state dict"),
]


@pytest.mark.parametrize(("content", "message"), CODE)
def test_nothing_but_tensors_is_unpickled(tmp_path, content, message):
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=message):
        pretrained("resnet18", tmp_path / "evil.pth")


def test_a_failed_download_says_how_to_give_a_file(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"resnet50-.*\.pth.*weights=PATH"):
        pretrained("resnet50", "imagenet")


def test_imagenet_weights_come_from_torchvisions_cache(tmp_path, monkeypatch):
    """Up to the download all is real: a file in torch's cache is what "imagenet" loads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision.models.resnet18().state_dict()
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[-1])
    net = pretrained("resnet18", "imagenet")
    assert torch.equal(net.backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingNet("resnet51"), "Unknown backbone 'resnet51': choose resnet8, resnet18"),
        (lambda: EmbeddingNet(last_stride=3), "must be 1 or 2.*last_stride=3"),
        (lambda: EmbeddingNet(dim=0), "at least 1.*dim=0"),
        (lambda: pretrained("resnet8", "imagenet"), "no ImageNet weights of resnet8"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
