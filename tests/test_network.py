"""The embedding network: shapes, strides, heads, and weights that fit or do not."""

from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from reidlib.model.depthwise import StridedDepthwise
from reidlib.model.embed import folded
from reidlib.model.network import BACKBONES, EmbeddingNet
from reidlib.model.weights import build_model, read_weights
from reidlib.recipes import make_recipe


def pretrained(backbone, weights):
    return build_model(make_recipe(backbone=backbone, weights=str(weights)))


def features(net, size=(64, 32)):
    with torch.no_grad():
        return net.backbone(torch.rand(2, 3, *size))


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
    one = EmbeddingNet(backbone, last_stride=1).eval()
    height, width = features(net.eval()).shape[2:]
    assert (height, width) == ((4, 2) if backbone == "resnet8" else (2, 1))
    assert features(one).shape[2:] == (2 * height, 2 * width)
    assert [*one.state_dict()] == [*net.state_dict()]
    one.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert one(torch.rand(2, 3, 64, 32)).shape == (2, 128)


def test_the_network_is_trinet():
    net = EmbeddingNet()
    assert [type(m) for m in net.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert (net.head[0].in_features, net.head[0].out_features) == (2048, 1024)
    assert (net.head[3].in_features, net.head[3].out_features) == (1024, 128)
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


def test_without_a_head_the_embedding_is_the_pooled_features():
    net = EmbeddingNet("resnet18", head=False).eval()
    assert net.dim == 512
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.backbone(x).mean((2, 3)))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, (2, 1)), (3, 3)])
@pytest.mark.parametrize("size", [(8, 4), (7, 5), (2, 1)])
def test_the_strided_depthwise_gradient_is_pytorchs(kernel, stride, size):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6, bias=False).double()
    x = torch.rand(3, 6, *size, dtype=torch.float64, requires_grad=True)
    expected = plain(x)
    gradient = torch.rand_like(expected)
    expected = (expected, *torch.autograd.grad(expected, [x, plain.weight], gradient))
    assert all(value.abs().sum() > 0 for value in expected)
    quick = StridedDepthwise.of(plain)
    assert quick.weight is plain.weight
    out = quick(x)
    torch.testing.assert_close(
        (out, *torch.autograd.grad(out, [x, quick.weight], gradient)), expected
    )


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v3_small"])
def test_a_mobilenets_gradients_are_torchvisions(backbone):
    """All strided depthwise convolutions are replaced, and nothing else changes, in bfloat16 too."""
    torch.manual_seed(0)
    net = EmbeddingNet(backbone).backbone
    strided = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert [type(m) for m in strided] == [nn.Conv2d] + [StridedDepthwise] * (len(strided) - 1)
    assert len(strided) > 3
    reference = nn.Sequential()
    reference.features = BACKBONES[backbone][0]().features
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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
def test_weights_load_from_a_file(tmp_path, backbone, suffix):
    source = BACKBONES[backbone][0]()
    path = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:  # as DataParallel training scripts save them
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    net = pretrained(backbone, path)
    for key, value in net.backbone.state_dict().items():
        assert torch.equal(value, state[key])
    other = EmbeddingNet(backbone)
    assert not torch.equal(next(other.parameters()), next(net.parameters()))


def test_a_file_that_does_not_fit_says_which_keys(tmp_path):
    path, whole = tmp_path / "a.pth", torchvision.models.resnet18().state_dict()
    key = "layer4.1.conv2.weight"
    broken = whole["bn1.running_var"].clone()
    broken[3] = torch.nan
    for state, message in [
        ({k: v for k, v in whole.items() if k != key}, rf"lacks 1 of its .* keys: {key}"),
        (whole | {"layer9.weight": torch.zeros(1)}, "unknown 1 .*layer9.weight"),
        (whole | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "other shapes in 1 .*conv1.weight"),
        (whole | {"bn1.running_var": broken}, "NaN or infinity in 1 .*bn1.running_var"),
    ]:
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            pretrained("resnet18", path)
    with pytest.raises(ValueError, match="do not fit mobilenet_v2: the file lacks"):
        pretrained("mobilenet_v2", path)


class Evil:
    """Ends the program when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        read_weights(tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_or_absent_file_is_named(tmp_path, suffix):
    path = tmp_path / f"short{suffix}"
    with pytest.raises(FileNotFoundError, match="short"):
        read_weights(path)
    state = {"a": torch.rand(100)}
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="short.* cannot be read"):
        read_weights(path)


def test_a_failed_download_says_how_to_give_a_file(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"resnet50-.*\.pth.*weights=PATH"):
        pretrained("resnet50", "imagenet")


def test_imagenet_weights_come_from_torchvisions_cache(tmp_path, monkeypatch):
    """Up to the download all is real: a file in torch's cache is what "imagenet" loads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision.models.resnet18().state_dict()
    url = BACKBONES["resnet18"][1].url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / url.rsplit("/", 1)[-1])
    net = pretrained("resnet18", "imagenet")
    assert torch.equal(net.backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(backbone="resnet51"), "Unknown backbone 'resnet51': choose one of resnet8, resnet18"),
        (dict(last_stride=3), "must be 1 or 2"),
        (dict(dim=0), "at least 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingNet(**arguments)


def test_a_backbone_without_imagenet_weights_says_so():
    with pytest.raises(ValueError, match="no ImageNet weights of resnet8"):
        pretrained("resnet8", "imagenet")
