"""The PK sampler: what an epoch shows, ragged identities, exact length, restore."""

from collections import Counter
from itertools import chain, islice, repeat

import numpy as np
import pytest

from reidlib.data.sampler import PKSampler

RAGGED = np.repeat([0, 3, 5, 8, 9, 12, 40], [9, 1, 4, 2, 17, 6, 3])


def shuffled(pids, seed=0):
    return np.random.default_rng(seed).permutation(pids)


@pytest.mark.parametrize("epoch", ["identities", "images"])
@pytest.mark.parametrize(("p", "k"), [(2, 4), (3, 2), (7, 4), (1, 1), (4, 5)])
def test_every_batch_is_p_identities_of_k_images(epoch, p, k):
    pids = shuffled(RAGGED)
    size = Counter(pids.tolist())
    sampler = PKSampler(pids, p, k, epoch, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    seen = Counter()
    for batch in batches:
        assert batch.shape == (p * k,) and batch.dtype == np.int64
        groups = pids[batch].reshape(p, k)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0].tolist())) == p
        for rows in batch.reshape(p, k):
            shown = Counter(rows.tolist())
            n = size[int(pids[rows[0]])]
            # even: rows that are shown differ by one at most; no duplicate where there are K images
            assert len(shown) == min(n, k)
            assert max(shown.values()) - min(shown.values()) <= 1
        seen.update(batch.tolist())
    identities = Counter(pids[b].reshape(p, k)[i, 0] for b in batches for i in range(p))
    assert set(identities) == set(size)
    if epoch == "images":
        assert set(seen) == set(range(len(pids)))
    else:
        # every identity once; only the fill of the last batch comes on top
        assert sum(identities.values()) - len(size) < p


def test_trinet_epoch_on_market_sizes():
    pids = np.repeat(np.arange(751), 17)
    shown = [pids[batch[::4]] for batch in PKSampler(pids, 18, 4)]
    assert len(shown) == 42  # ceil(751 / 18)
    assert set(np.concatenate(shown)) == set(range(751))


def test_one_identity_with_most_images_sets_the_length():
    pids = np.repeat([0, 1, 2], [20, 2, 2])
    sampler = PKSampler(pids, p=2, k=2, epoch="images")
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10
    assert set(np.concatenate(batches).tolist()) == set(range(24))


def test_epochs_differ_and_the_seed_decides():
    sampler, again, other = (PKSampler(RAGGED, 3, 2, seed=seed) for seed in (1, 1, 2))
    first, second, same, others = (np.concatenate([*s]) for s in (sampler, sampler, again, other))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, second) and not np.array_equal(first, others)


@pytest.mark.parametrize("epoch", ["identities", "images"])
@pytest.mark.parametrize("stop", range(0, 9))
def test_a_restored_sampler_gives_the_batches_that_would_have_come(epoch, stop):
    def stream(sampler, n):
        return [*islice(chain.from_iterable(repeat(sampler)), n)]  # epoch after epoch

    whole = stream(PKSampler(RAGGED, 3, 2, epoch, seed=5), 14)
    broken, restored = (PKSampler(RAGGED, 3, 2, epoch, seed=seed) for seed in (5, 99))
    stream(broken, stop)
    restored.load_state_dict(broken.state_dict())
    assert np.array_equal(whole[stop:], stream(restored, 14 - stop))


WRONG = {
    "list of identities": dict(pids=[], p=2, k=2),
    "P = 3 identities, the data has 2": dict(pids=[1, 1, 2], p=3, k=2),
    "the data has 1: without a second identity there is no": dict(pids=[1, 1, 1], p=2, k=2),
    "1 rows are junk": dict(pids=[1, -1, 2], p=2, k=2),
    "at least 1, got P = 0": dict(pids=[1, 2], p=0, k=2),
    "at least 1, got P = 2, K = 0": dict(pids=[1, 2], p=2, k=0),
    "Unknown epoch 'all'": dict(pids=[1, 2], p=2, k=2, epoch="all"),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_say_what_is_wrong(message):
    with pytest.raises(ValueError, match=message):
        PKSampler(**WRONG[message])
