"""Several processes, chunks, faults: the same gradients, batches and runs as one process has."""

import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_training import final_state, small
from torch import nn

from reidlib import runs
from reidlib.paths import ROOT, outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training import chunks, distributed, loop
from reidlib.training.checkpoint import load_checkpoint
from reidlib.training.chunks import in_chunks
from reidlib.training.distributed import across, average
from reidlib.training.losses import LOSSES, diagnostics

same = torch.testing.assert_close

# --- processes that wait for something to do


def wait_for_tasks(rank, pipe):
    """What a process of the pool does: whatever it is told, as one of so many."""
    torch.set_num_threads(1)
    met_at = None
    while True:
        size, store, places, function, args = pipe.recv()
        os.environ.update(places)
        torch.manual_seed(0)
        try:
            if store != met_at:
                if dist.is_initialized():
                    dist.destroy_process_group()
                options = {"rank": rank, "world_size": size, "init_method": f"file://{store}"}
                dist.init_process_group("gloo", timeout=timedelta(seconds=60), **options)
                met_at = store
            pipe.send(("done", function(*args)))
        except BaseException as error:  # SystemExit and KeyboardInterrupt are results, too
            if dist.is_initialized():  # others may wait for this one
                dist.destroy_process_group()
            pipe.send((f"{type(error).__name__}: {error}", traceback.format_exc()))


class Pool:
    """Three processes with torch; the first two, or all, work at a task."""

    def __init__(self, folder):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["reidlib.training.loop", "reidlib.evaluation.scoring"])
        self.folder, self.met, self.count, self.pipes, self.processes = folder, 0, 0, [], []
        for rank in range(3):
            pipe, end = context.Pipe()
            process = context.Process(target=wait_for_tasks, args=(rank, end), daemon=True)
            process.start()
            self.pipes.append(pipe), self.processes.append(process)

    def outcomes(self, size, function, *args):
        """What each of so many processes has made of a task: ("done", result) or (error, traceback)."""
        if size != self.met:  # they meet anew
            self.met, self.count = size, self.count + 1
        names = ("REID_DATA", "REID_CACHE", "REID_OUTPUTS")
        places = {name: os.environ[name] for name in names}
        for pipe in self.pipes[:size]:
            pipe.send((size, self.folder / f"store{self.count}", places, function, args))
        outcomes = [self.received(pipe) for pipe in self.pipes[:size]]
        if any(said != "done" for said, _ in outcomes):
            self.met = 0
        return outcomes

    def received(self, pipe):
        assert pipe.poll(120), "a process hangs"
        return pipe.recv()

    def __call__(self, size, function, *args):
        """The results of all processes; one process is this one."""
        if size == 1:
            return [function(*args)]
        outcomes = self.outcomes(size, function, *args)
        assert [said for said, _ in outcomes] == ["done"] * size, "\n".join(o[1] for o in outcomes)
        return [result for _, result in outcomes]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    for process in made.processes:
        process.kill()


# --- losses and gradients

SIZES = (2, 3)
each_size = pytest.mark.parametrize("size", SIZES)


def layout(name, size):
    """The identities of a batch, and which images lie on which process."""
    if name == "dealt":  # as the loop does it: P = 6, K = 4
        shares = [torch.arange(24).view(6, 4)[r::size].flatten() for r in range(size)]
        return torch.arange(6).repeat_interleave(4), shares
    if name == "uneven":  # identities on several processes, and of one image
        pids = torch.tensor([3, 3, 3, 5, 5, 7, 7, 7, 7, 9, 9, 3, 4, 5, 7])
        order = torch.randperm(15, generator=torch.Generator().manual_seed(size))
        return pids, [*order.split((9, 6) if size == 2 else (8, 1, 6))]
    if name == "split":  # as many images on each, of any identity
        order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
        return torch.arange(12) // 4, [*order.split(12 // size)]
    # the last process has no positive for any of its anchors
    pids = torch.tensor([1, 1, 2, 2, 1, 2, 3, 4, 5])
    return pids, [*torch.arange(9).split((6, 3) if size == 2 else (4, 2, 3))]


CASES = [
    (loss, margin, reduction, options)
    for loss in LOSSES
    for margin in (0.3, "soft")
    for options in ([{"mean": "active"}, {"mean": "valid"}] if loss == "batch_all" else [{}])
    for reduction in ("loss", "total")
]


def network(dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


def learn(name, size, dtype, chunk=None, broken="", wrap=None):
    """The loss, its diagnostics and every parameter's gradient, for each case."""
    pids, shares = layout(name, size)
    images = torch.randn(len(pids), 6, generator=torch.Generator().manual_seed(5)).to(dtype)
    alone = not dist.is_initialized()
    own = torch.arange(len(pids)) if alone else shares[dist.get_rank()]
    shares = shares[1:] + shares[:1] if broken == "shifted" else shares
    results = []
    for loss, margin, reduction, options in CASES:
        model = network(dtype)
        embed = wrap(model) if wrap else model
        torch.manual_seed(2)  # of the draws of random triplets
        result = across(
            lambda emb, pids, anchors=None, loss=loss, margin=margin, options=options: LOSSES[loss](
                emb, pids, margin, anchors=anchors, **options
            ),
            in_chunks(embed, images[own], chunk),
            pids,
            shares,
        )
        getattr(result, reduction).backward()
        if not wrap:
            average(model)
        numbers = diagnostics(result) | {"total": result.total.item()}
        values = {field: getattr(result, field).detach() for field in ("per_anchor", "counted")}
        results.append((numbers, values, [p.grad for p in model.parameters()]))
    return results


def compare(found, expected, dtype):
    """All numbers and gradients of one process with those of another, each beside its size."""
    eps = 1e-12 if dtype == torch.float64 else 1e-6
    for case, *both in zip(CASES, found, expected, strict=True):
        (numbers, values, gradients), (wanted, wanted_values, wanted_gradients) = both
        assert numbers == pytest.approx(wanted, rel=eps, abs=eps, nan_ok=True), case
        same(values, wanted_values, equal_nan=True, atol=eps, rtol=eps)
        # Some are sums that cancel: what rounding leaves there is small beside the others.
        largest = max(gradient.abs().max().item() for gradient in wanted_gradients)
        assert largest > 0.01, case
        near = {"atol": eps * max(1, largest), "rtol": 0}
        same(gradients, wanted_gradients, msg=lambda text, case=case: f"{case}: {text}", **near)


@each_size
@pytest.mark.parametrize("name", ["dealt", "uneven", "without positives"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_diagnostics_and_gradients_are_those_of_one_process(pool, name, size, dtype):
    expected = learn(name, size, dtype)
    for found in pool(size, learn, name, size, dtype):
        compare(found, expected, dtype)


def in_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


@each_size
def test_chunks_in_several_processes_and_pytorchs_own_mean_give_the_same(pool, size):
    expected = learn("uneven", size, torch.float64)
    for options in ((2,), (None, "", in_ddp)):
        for found in pool(size, learn, "uneven", size, torch.float64, *options):
            compare(found, expected, torch.float64)


def without_the_sum(*args):
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.share), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed._Gather, "backward", staticmethod(backward))
        return learn(*args)


@each_size
@pytest.mark.parametrize("fault", ["without the sum", "shifted"])
def test_negative_control_a_wrong_gradient_shows(pool, size, fault):
    arguments = ("split", size, torch.float64)
    expected = learn(*arguments)
    tried = (without_the_sum, *arguments) if "sum" in fault else (learn, *arguments, None, fault)
    for found in pool(size, *tried):
        for case, one, wanted in zip(CASES, found, expected, strict=True):
            differ = [not torch.allclose(*both) for both in zip(one[2], wanted[2], strict=True)]
            assert all(differ[:2]), case


# --- the loop


def seen(recipe):
    """Of each step, where this process's images are in the batch, what they are, and all identities."""
    found = []

    def note(loss, emb, pids, shares):
        found[-1] += pids.tolist(), shares[distributed.rank()]
        return across(loss, emb, pids, shares)

    def embed(model, images, chunk):
        found.append([images.clone()])
        return in_chunks(model, images, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "across", note)
        patch.setattr(loop, "in_chunks", embed)
        loop.train(recipe, f"of_{distributed.size()}", device="cpu", show_progress=False)
    return found


def test_one_two_and_three_processes_see_the_same_batches_and_number_people_alike(pool):
    recipe = small(p=6, steps=3, hold_out=0, enlarge=1.2, erasing=0.5)
    (expected,) = pool(1, seen, recipe)
    for size in SIZES:
        of_all = pool(size, seen, recipe)
        for step, (images, pids, _) in enumerate(expected):
            whole = torch.full_like(images, torch.nan)
            for found in of_all:
                assert found[step][1] == pids
                whole[found[step][2]] = found[step][0]
            assert torch.equal(whole, images)


def trained(recipe, tag, resume="auto"):
    """Train as one of the pool, and return the digest of the network that this process has."""
    states = []

    def start(*args):
        states.append(made := loop_start(*args))
        return made

    loop_start = loop._start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_start", start)
        loop.train(recipe, tag, resume, device="cpu", show_progress=False)
    numbers = b"".join(v.numpy().tobytes() for v in states[-1].model.state_dict().values())
    return hashlib.sha256(numbers).hexdigest()


RECIPE = {"hold_out": 0, "evaluate_every": 12}
RUN = "synthetic_batchhard_softplus_{}"

# The command line, in processes that kill themselves: after so many restarts, which, in which step.
CHILD = """
import itertools, os, signal, sys
from reidlib.__main__ import main
from reidlib.training import distributed
across, steps = distributed.across, itertools.count(1)
kills = {("0", "0"): 7}
me = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
def killed(*args):
    if next(steps) == kills.get(me):
        os.kill(os.getpid(), signal.SIGKILL)
    return across(*args)
distributed.across = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_processes_start_again_and_go_on_bit_for_bit(pool, tmp_path):
    recipe = small(**RECIPE)
    first, second = pool(2, trained, recipe, "whole")
    assert first == second  # all processes end with the same network, running statistics too
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    settings = recipe.model_dump(exclude_defaults=True, exclude_none=True) | {"tag": "killed"}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += ["--max-restarts=1", str(child), "--", "train", *options, "--device=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    done = subprocess.run(line, cwd=ROOT, **words)
    assert done.returncode == 0, done.stderr
    folder = runs.find_run(RUN.format("killed"))
    assert done.stdout.splitlines() == [str(folder)]  # the first process speaks, and writes
    told = "2 processes train 2 of the 4 identities of each batch. BatchNorm"
    assert done.stderr.count(told) == 2
    assert "Process 1 of 2" in done.stderr and "has lost the others" in done.stderr
    assert final_state(folder) == final_state(outputs_dir() / RUN.format("whole"))
    manifest = runs.read_json(folder / "manifest.json")
    assert manifest["processes"] == 2
    assert manifest["reproduce"].startswith("torchrun --nproc-per-node 2 -m reidlib -- train ")


def stopped(recipe, number):
    """Train, and send the second process a signal in its third step."""
    steps = []

    def signalled(*args):
        steps.append(1)
        if len(steps) == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), number)
        return across(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "across", signalled)
        loop.train(recipe, "stopped", device="cpu", show_progress=False)


def test_a_signal_to_one_process_stops_all_after_the_same_step(pool):
    recipe = small(**RECIPE)
    for number, said in ((signal.SIGTERM, "SystemExit: 143"), (signal.SIGINT, "SystemExit: 130")):
        outcomes = pool.outcomes(2, stopped, recipe, number)
        assert outcomes[1][0] == said
        assert outcomes[0][0] == said if number == signal.SIGTERM else "Stopped: " in outcomes[0][0]
        folder = runs.find_run(RUN.format("stopped"))
        step = 3 if number == signal.SIGTERM else 6
        assert load_checkpoint(folder / "checkpoint.pt")["step"] == step


def test_a_run_of_other_processes_is_refused(pool):
    recipe = small(steps=2, hold_out=0)
    pool(2, trained, recipe, "other")
    with pytest.raises(ValueError, match="other settings .processes: 2 there, 1 now"):
        trained(recipe, "other")


def only_here(fault, recipe, rank):
    """Train where one process has no data, or other data, or too many processes."""
    if distributed.rank() == rank:
        os.environ["REID_DATA"] = fault
    loop.train(recipe, "fault", device="cpu", show_progress=False)


def test_what_one_process_cannot_read_ends_all_with_one_message(pool, tmp_path):
    nowhere = make_recipe("demo", **small().model_dump() | {"dataset": "market1501"})
    (tmp_path / "other").mkdir()
    for rank in (1, 0):
        outcomes = pool.outcomes(2, only_here, str(tmp_path / "other"), nowhere, rank)
        assert outcomes[1][0] == "SystemExit: 1", outcomes


def test_bad_input_is_refused_in_one_line(pool):
    for changes, message in (
        (
            {"p": 5},
            "ValueError: 2 processes cannot share p = 5 .* multiple of 2 for p, or one of 1, 5",
        ),
        ({"chunk": 5}, "ValueError: chunk = 5 is more than the 4 images of a batch in one process"),
        ({"weights": "/typo.pth"}, "FileNotFoundError: There is no file of weights"),
    ):
        recipe = small(hold_out=0, **changes)
        (said, trace), (beside, _) = pool.outcomes(2, trained, recipe, "bad")
        assert re.match(message, said), trace
        assert beside == "SystemExit: 1"
    with pytest.raises(ValueError, match="chunk = 0: should be greater than or equal to 2"):
        small(chunk=0)
    with pytest.raises(ValueError, match="chunk = 9 is more than the 8 images"):
        trained(small(hold_out=0, chunk=9), "bad")
    with pytest.raises(ValueError, match="chunk = 2 leaves one of 9 images alone.*take 3"):
        chunks.check_chunk(2, 9)


# --- chunks


class Noisy(nn.Module):
    """A network with all that a second embedding could get wrong: dropout and BatchNorm."""

    def __init__(self, dtype, dropout=0.5):
        super().__init__()
        torch.manual_seed(3)
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(dropout)
        self.features, self.head = nn.Sequential(*layers), nn.Linear(8, 4)
        self.to(dtype)

    def forward(self, images):
        return self.head(self.features(images).mean(dim=(2, 3)))


def step(model, chunk, dtype, embed=in_chunks):
    """Gradients, buffers and what comes next of the random numbers, after a step."""
    images = torch.randn(12, 3, 8, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.manual_seed(4)
    emb = embed(model, images, chunk)
    LOSSES["batch_hard"](emb, torch.arange(12) // 3, "soft").loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, {k: v.clone() for k, v in model.named_buffers()}, torch.rand(3)


def graphs_kept(model, images, chunk):
    """What chunks stand for: the same, with the activations of all of them in memory."""
    return torch.cat([model(part) for part in images.tensor_split(-(-len(images) // chunk))])


NEAR = {torch.float64: {"atol": 1e-12, "rtol": 1e-12}, torch.float32: {"atol": 1e-6, "rtol": 1e-5}}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("chunk", [2, 5, 12])
def test_chunks_give_the_gradient_of_the_whole_batch(dtype, chunk):
    # BatchNorm in evaluation: the whole batch, at once.
    whole, cut = (step(Noisy(dtype, 0).eval(), c, dtype) for c in (None, chunk))
    assert all(gradient.abs().sum() > 0 for gradient in whole[0].values())
    same(cut[0], whole[0], **NEAR[dtype])
    # In training, with dropout: what is embedded twice is drawn twice alike, and counted once.
    whole = step(Noisy(dtype), chunk, dtype, graphs_kept)
    cut = step(Noisy(dtype), chunk, dtype)
    for one, other in zip(cut, whole, strict=True):
        same(one, other, **NEAR[dtype])


@pytest.mark.parametrize("lost", ["random state", "running statistics"])
def test_negative_control_a_second_embedding_that_is_not_the_first_shows(lost, monkeypatch):
    if lost == "random state":
        checkpoint = chunks.checkpoint
        forgetful = lambda *args, **options: checkpoint(*args, preserve_rng_state=False, **options)
        monkeypatch.setattr(chunks, "checkpoint", forgetful)
    else:
        monkeypatch.setattr(chunks, "_kept", lambda model: chunks.nullcontext())
    right = step(Noisy(torch.float64), 4, torch.float64, graphs_kept)
    wrong = step(Noisy(torch.float64), 4, torch.float64)
    with pytest.raises(AssertionError):
        same(*(tries[lost != "random state"] for tries in (wrong, right)))
