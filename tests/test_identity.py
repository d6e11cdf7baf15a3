"""The ID loss beside the triplets: its value and gradient, what it trains, what it leaves."""

import pytest
import torch

from reidlib.model.network import EmbeddingNet
from reidlib.model.weights import load_model
from reidlib.recipes import make_recipe
from reidlib.training.checkpoint import load_checkpoint
from reidlib.training.identity import WithClassifier, with_id_loss
from reidlib.training.loop import prepare, train
from reidlib.training.losses import batch_hard

SETTINGS = dict(head=False, norm=True, classifier=0.5, hold_out=0, height=32, width=16)
SETTINGS |= dict(p=4, k=2, steps=4, checkpoint_every=2, log_every=1)


def test_it_adds_the_smoothed_cross_entropy_of_the_definition():
    torch.manual_seed(0)
    identities, pids = torch.tensor([3, 7, 20]), torch.tensor([20, 3, 20, 3])
    outputs = torch.randn(4, 5 + 3, dtype=torch.float64, requires_grad=True)
    both = with_id_loss(lambda emb, pids: batch_hard(emb, pids, 0.2), identities, weight=0.5)
    found = both(outputs, pids).loss
    expected = batch_hard(outputs[:, :5], pids, 0.2).loss
    for row, column in enumerate((2, 0, 2, 0)):
        logits = outputs[row, 5:].float()
        log_p = [logits[j] - logits.exp().sum().log() for j in range(3)]
        wanted = [0.9 + 0.1 / 3 if j == column else 0.1 / 3 for j in range(3)]
        expected = expected - 0.5 / 4 * sum(q * p for q, p in zip(wanted, log_p, strict=True))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss, outputs)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert (ours[:, 5:].abs() > 0).all()


def test_triplets_see_the_features_and_the_classifier_their_batchnorm():
    model = EmbeddingNet("resnet8", head=False, norm=True)
    network = WithClassifier(model, 9).train()
    outputs = network(x := torch.rand(4, 3, 64, 32))
    pooled = model.pooled(x)
    torch.testing.assert_close(outputs[:, :-9], pooled)
    torch.testing.assert_close(outputs[:, -9:], network.classifier(model.norm(pooled)))


def test_the_loss_of_a_plan_is_that_of_embeddings_divided_by_the_temperature():
    plan = prepare(make_recipe("demo", **SETTINGS, temperature=4.0), show_progress=False)
    emb, pids = torch.randn(8, 256), torch.arange(4).repeat_interleave(2)
    assert plan.loss()(emb, pids).loss.equal(batch_hard(emb / 4, pids, "soft").loss)


def test_a_run_with_it_goes_on_bit_for_bit_and_leaves_the_network_alone():
    recipe = make_recipe("demo", **SETTINGS)
    folder = train(recipe, show_progress=False)
    whole = load_checkpoint(folder / "checkpoint.pt")["model"]
    train(recipe, resume="previous", show_progress=False)  # from step 2
    resumed = load_checkpoint(folder / "checkpoint.pt")["model"]
    assert "classifier.weight" in whole and all(whole[key].equal(resumed[key]) for key in whole)
    model = load_model(folder)
    assert model.dim == 256 and not any("classifier" in key for key in model.state_dict())


@pytest.mark.parametrize("change", [{"head": True}, {"norm": False}, {"reduction": "sum"}])
def test_it_needs_normed_features_without_a_head(change):
    with pytest.raises(ValueError, match="a classifier needs norm = True, head = False"):
        make_recipe("demo", **SETTINGS | change)


def test_several_processes_refuse_it(monkeypatch):
    monkeypatch.setattr("reidlib.training.distributed.size", lambda: 2)
    with pytest.raises(ValueError, match="in one process"):
        prepare(make_recipe("demo", **SETTINGS), show_progress=False)
