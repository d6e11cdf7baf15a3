"""The training loop: one run in one folder, stopped and resumed without a trace.

    folder = train(make_recipe("demo"))

`prepare` finds out what is known before the first step, `State` is all that a step changes, `Journal`
writes down what happens. What is left is the loop, on one screen: `_steps`.
"""

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch

from reidlib import runs
from reidlib.data.augment import Augmentation
from reidlib.data.check import on_both_sides
from reidlib.data.pixels import load_images
from reidlib.data.sampler import PKSampler
from reidlib.data.tables import Dataset, fingerprint, hold_out, load
from reidlib.look import board
from reidlib.look.live import Live
from reidlib.model.device import (
    autocast,
    check_memory,
    fast_at_bfloat16,
    pick_device,
    resolve_precision,
)
from reidlib.model.weights import build_model, load_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.progress import progress
from reidlib.recipes import WATCHING, Recipe, located
from reidlib.training import distributed
from reidlib.training.checkpoint import State, load_checkpoint
from reidlib.training.chunks import check_chunk, in_chunks
from reidlib.training.identity import WithClassifier, with_id_loss
from reidlib.training.journal import Journal, Onlooker, tell
from reidlib.training.losses import LOSSES, TripletLoss

Resume = Literal["auto", "previous", "never", "restart"]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is known of a training before its first step; nothing is written yet."""

    recipe: Recipe  # its precision resolved
    tag: str  # appended to the run's name
    device: torch.device
    folder: Path  # of the run
    table: pd.DataFrame  # the training images, N rows
    pixels: np.ndarray  # (N, H, W, 3) uint8
    data: str  # the table's fingerprint
    held_out: tuple[tuple[np.ndarray, pd.DataFrame], ...]  # of queries and gallery; () if nobody is
    steps: int  # of the whole training
    epoch: int  # steps in an epoch

    def sampler(self) -> PKSampler:
        """Return the sampler as it is before the first batch."""
        r = self.recipe
        return PKSampler(self.table["pid"], r.p, r.k, r.epoch, r.seed)

    def augmentation(self) -> Augmentation:
        """Return the augmentation as it is before the first batch."""
        r = self.recipe
        return Augmentation(
            (r.height, r.width), r.enlarge, r.flip, r.erasing, r.normalise, r.seed, r.colour, r.grey
        )

    def loss(self) -> Callable[..., TripletLoss]:
        """Return the recipe's triplet loss, of embeddings (N, D) and their pids (N,)."""
        r = self.recipe
        options = {"mean": r.mean} if r.loss == "batch_all" else {}
        triplets = partial(LOSSES[r.loss], margin=r.margin, squared=r.squared, **options)
        return lambda emb, *of, **chosen: triplets(emb / r.temperature, *of, **chosen)

    @property
    def identities(self) -> torch.Tensor:
        """(C,) the sorted pids of the training images."""
        return torch.from_numpy(np.unique(self.table["pid"])).to(self.device)


@distributed.in_turn()
def prepare(
    recipe: Recipe,
    tag: str = "",
    *,
    device: str = "auto",
    dataset: Dataset | None = None,
    show_progress: bool = True,
) -> Plan:
    """Load the data, take the held-out people out of it, and find out how long training will be.

    Args:
        recipe: all settings.
        tag: appended to the run's name, so that runs of the same variant stand side by side.
        device: `"auto"`, `"cpu"`, `"cuda"`, …
        dataset: already loaded; by default the recipe's is.
        show_progress: draw bars.

    Raises:
        ValueError: data that does not suit the recipe.
    """
    target, tag = pick_device(device), str(tag)  # which may come as a number
    check_memory(recipe)
    recipe = resolve_precision(located(recipe), target)
    if recipe.precision == "bfloat16" and fast_at_bfloat16(target) is False:
        tell('This processor emulates bfloat16, slowly: take precision = "float32" or "auto".')
    dataset = dataset or load(recipe.dataset, pattern=recipe.pattern)
    if said := on_both_sides(dataset):
        tell(said)
    folder = outputs_dir() / runs.run_name(dataset.name, recipe, tag)
    table, held_out = dataset.train, ()
    if recipe.hold_out:
        # The same identities whatever the run's seed, so that runs can be compared on them.
        table, *others = hold_out(table, recipe.hold_out, seed=0)
        held_out = tuple(load_images(one, recipe, show_progress) for one in others)
    pixels, table = load_images(table, recipe, show_progress, training=True)
    epoch = len(PKSampler(table["pid"], recipe.p, recipe.k, recipe.epoch))
    steps = recipe.steps or recipe.epochs * epoch
    if recipe.classifier and distributed.size() > 1:
        raise ValueError("A classifier is trained in one process: start it without torchrun.")
    check_chunk(recipe.chunk, len(distributed.shares(recipe.p, recipe.k)[0]))
    data = fingerprint(table)
    return Plan(recipe, tag, target, folder, table, pixels, data, held_out, steps, epoch)


def train(
    recipe: Recipe | Plan,
    tag: str = "",
    resume: Resume = "auto",
    device: str = "auto",
    dataset: Dataset | None = None,
    show_progress: bool = True,
    *,
    longer: bool = True,
) -> Path:
    """Train one run to its last step, and return its folder.

    Ctrl-C and SIGTERM end the step under way, write a checkpoint, and leave by KeyboardInterrupt or
    SystemExit; a kill loses what came after the last checkpoint. Where torchrun has started several
    processes, they train the run together (see `distributed`).

    Args:
        recipe: all settings; or what `prepare` returned, which then has tag, device and dataset.
        tag, device, dataset, show_progress: as in `prepare`.
        resume: what to do with a run of this name: `"auto"` goes on from its last checkpoint,
            `"previous"` from the one before, `"never"` refuses, `"restart"` replaces the run, which
            is kept beside it (`runs.asides`) until the new one has written a checkpoint.
        longer: a finished run goes on where the recipe has more steps. The learning rate then is that
            of a run of so many steps, so it is no run of so many at once; False refuses.

    Raises:
        ValueError: data that does not suit; a run with other settings; a broken checkpoint.
        FileExistsError: the run exists and `resume` is `"never"`.
        TrainingFailed: NaN or infinite loss or weights; the last checkpoint is from before.
        RuntimeError: another process is writing this run; this one has lost those it trains with.

    >>> from reidlib.recipes import make_recipe
    >>> recipe = make_recipe("demo", hold_out=0, height=32, width=16, p=4, k=2, steps=1)
    >>> run = train(recipe, tag="one_step", show_progress=False)
    >>> (run / "weights.safetensors").exists()
    True
    """
    if resume not in get_args(Resume):
        raise ValueError(f"resume = {resume!r}: choose {', '.join(get_args(Resume))}.")
    show_progress = show_progress and not distributed.rank()
    options = {"device": device, "dataset": dataset, "show_progress": show_progress}
    with distributed.joined(), ExitStack() as held:
        plan = recipe
        if isinstance(recipe, Recipe):
            plan = distributed.together(partial(prepare, recipe, tag, **options))
        begin = partial(_begin, plan, resume, longer, held)
        resume, *begun = distributed.together(begin, by_first=True)
        if begun:
            # Says whatever is wrong with the network or its weights, before anything is replaced.
            state = distributed.together(partial(_start, plan, *begun))
            distributed.align(state.network, plan.device)
            replaced = resume == "restart" and not distributed.rank()
            with _replaced(plan.folder) if replaced else nullcontext():
                _run(plan, state, show_progress)
    return plan.folder


def _begin(plan: Plan, resume: Resume, longer: bool, held: ExitStack) -> tuple:
    """Lock the run, and return what to do: how to resume, the data, and the checkpoint to go on from.

    If the run is done, it is how to resume alone.
    """
    folder, manifest = plan.folder, plan.folder / "manifest.json"
    held.enter_context(runs.lock(folder))
    if distributed.is_second_start() and resume != "previous" and manifest.exists():
        # What was asked was done, if the run had begun.
        resume = "auto" if runs.read_json(manifest)["status"] == "running" else resume
    checkpoint = _existing(plan, resume, longer)
    if resume != "restart" and _is_done(plan, checkpoint):
        tell(
            f"{folder.name} was trained before, with these settings and data, and is left as it is. "
            'To train it again, give another tag, or resume = "restart" to replace it.'
        )
        return (resume,)
    return resume, checkpoint, plan.data


def _run(plan: Plan, state: State, show_progress: bool) -> None:
    """Train from a state to the end, and write down all of it."""
    if distributed.rank():
        with stop_signals() as asked:
            _steps(plan, state, Onlooker(), asked, progress(show=False))
        return
    folder, recipe = plan.folder, plan.recipe
    if said := distributed.in_words(recipe.p, plan.device):
        tell(said)
    if not (folder / "checkpoint.pt").exists():
        board.erase(folder)  # event files of steps that will come again
        for kept in runs.asides(folder):
            tell(f"The run that this one replaces is {kept} until a checkpoint is written.")
    with stop_signals() as asked, board.Board(folder, recipe, plan.steps, state.step) as shown:
        journal = Journal(plan, state, shown, Live(recipe, plan.steps, show_progress))
        words = {"desc": "train", "unit": "step", "show": show_progress}
        with progress(total=plan.steps, initial=state.step, **words) as bar:  # ends before an error
            _steps(plan, state, journal, asked, bar)
        save_weights(folder / "weights.safetensors", state.model, recipe)
        journal.write_manifest("finished")


@contextmanager
def _replaced(folder: Path):
    """Set a run aside while another is trained in its place; put it back where that one fails early.

    What fails with a checkpoint can go on from it. A kill puts nothing back, and loses nothing.
    """
    if [path.name for path in folder.iterdir()] == [".lock"]:
        yield
        return
    aside = runs.set_aside(folder)
    with runs.lock(folder):  # the other lock went with the run
        try:
            yield
        except BaseException:
            if not (folder / "checkpoint.pt").exists():
                shutil.rmtree(folder)
                aside.rename(folder)
            raise


def _is_done(plan: Plan, checkpoint: dict | None) -> bool:
    """Return whether a run was trained to its end and has its weights, which are read.

    Raises:
        ValueError: they are damaged, and there is no checkpoint to write them from.
    """
    manifest, weights = (plan.folder / name for name in ("manifest.json", "weights.safetensors"))
    finished = manifest.exists() and runs.read_json(manifest)["status"] == "finished"
    # A released run has its weights and no checkpoint.
    whole = checkpoint is None or checkpoint["step"] >= plan.steps
    if not (finished and whole and weights.is_file()):
        return False
    with suppress(ValueError) if checkpoint else nullcontext():
        return bool(load_model(plan.folder))
    return False


def _existing(plan: Plan, resume: Resume, longer: bool) -> dict | None:
    """Return the checkpoint to go on from, after comparing the settings; None for a new run."""
    folder, manifest = plan.folder, plan.folder / "manifest.json"
    weights = [*folder.glob("*.safetensors")]
    left = [*weights, *folder.glob("checkpoint*.pt")]
    if resume == "restart" or not (manifest.exists() or left):
        return None  # the manifest is written before the first step, so nothing was trained
    if not manifest.exists():
        raise ValueError(
            f"{folder} holds {left[0].name} and no manifest.json, so nobody can say how it was trained. "
            "Give another tag, or move that folder away."
        )
    if resume == "never":
        raise FileExistsError(f"The run {folder} exists. Give another tag.")
    before = runs.read_json(manifest)
    finished, grown = before["status"] == "finished", plan.steps > before["steps"]
    free = {*WATCHING, *(("steps", "epochs") if grown and finished and longer else ())}
    old = located(runs.read_recipe(folder)).model_dump(exclude=free)
    went_on, processes = before.get("went_on_after"), before.get("processes", 1)
    old |= {
        "data fingerprint": before["train_data"],
        "went on after": went_on,
        "processes": processes,
    }
    now = plan.recipe.model_dump(exclude=free) | {"data fingerprint": plan.data}
    now |= {"went on after": went_on if longer else None, "processes": distributed.size()}
    if differ := [f"{k}: {old[k]!r} there, {now[k]!r} now" for k in now if old[k] != now[k]]:
        raise ValueError(
            f"The run {folder.name} was made with other settings ({'; '.join(differ)}). Give another "
            'tag, or resume="restart" to replace it.'
        )
    last, previous = (folder / f"checkpoint{which}.pt" for which in ("", "_previous"))
    if resume == "previous":
        return load_checkpoint(previous)
    # No checkpoint yet: killed before the first one. An absent one with an older one left is not that.
    if last.exists() or previous.exists():
        return load_checkpoint(last)
    if grown or finished != bool(weights):
        raise ValueError(
            f"{folder} has no checkpoint.pt to go on from. Give another tag, and start from what it has "
            f'learnt, if that is there: weights={folder.name!r}. Or train it anew with resume="restart".'
        )
    return None


def _start(plan: Plan, checkpoint: dict | None, data: str) -> State:
    """Make all that a step changes, fresh or as the checkpoint says."""
    if data != plan.data:
        raise ValueError("it sees other training images than process 0.")
    torch.manual_seed(plan.recipe.seed)
    model = build_model(plan.recipe, pretrained=checkpoint is None)
    network = WithClassifier(model, len(plan.identities)) if plan.recipe.classifier else model
    network.to(plan.device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(
        network.parameters(),
        lr=plan.recipe.lr,
        weight_decay=plan.recipe.weight_decay,
        fused=True,
    )
    state = State(network, optimiser, plan.sampler(), plan.augmentation())
    if checkpoint:
        state.load_state_dict(checkpoint)
    return state


def _steps(plan: Plan, state: State, journal: Journal, asked: list[int], bar) -> None:
    """Train from the state's step to the last one."""
    recipe = plan.recipe
    loss = plan.loss()
    if recipe.classifier:
        loss = with_id_loss(loss, plan.identities, recipe.classifier)
    pids = torch.tensor(plan.table["pid"].to_numpy(), device=plan.device)
    pixels = torch.from_numpy(plan.pixels)
    if pixels.nbytes < 4e9:  # they fit beside the network: no transfer in a step
        pixels = pixels.to(plan.device)
    started = time.monotonic() - state.seconds
    # Epoch after epoch, (P·K,) row numbers a step; `own` (b,) says which this process embeds.
    batches = chain.from_iterable(repeat(state.sampler))
    shares = distributed.shares(recipe.p, recipe.k)
    own = shares[distributed.rank()]
    for rows in map(torch.from_numpy, islice(batches, plan.steps - state.step)):
        # (b, H, W, 3) uint8 -> (b, 3, h, w)
        batch = pixels[rows[own].to(pixels.device)].to(plan.device)
        batch = state.augmentation(batch, own, len(rows))
        lr = recipe.learning_rate(state.step, plan.steps)
        for group in state.optimiser.param_groups:
            group["lr"] = lr
        # (b, 3, h, w) -> (b, D)
        with autocast(plan.device, recipe.precision):
            batch = batch.contiguous(memory_format=torch.channels_last)
            emb = in_chunks(state.network, batch, recipe.chunk)
        result = distributed.across(loss, emb, pids[rows.to(pids.device)], shares)
        state.step += 1
        if not math.isfinite(result.loss.item()):
            journal.fail("the loss")
        state.optimiser.zero_grad(set_to_none=True)
        (result.total if recipe.reduction == "sum" else result.loss).backward()
        distributed.average(state.network)
        state.optimiser.step()
        bar.update()

        state.seconds = time.monotonic() - started
        # Looked at once: a signal may come at any line, and may have come to one process alone.
        stopping = distributed.agreed(asked[0] if asked else 0)
        journal.after_step(result, lr, bool(stopping))
        bar.set_postfix_str(f"loss {result.loss.item():.3f}", refresh=False)
        if stopping and state.step < plan.steps:
            bar.close()
            journal.stop(stopping)


@contextmanager
def stop_signals():
    """Yield a list in which the first Ctrl-C or SIGTERM is noted; the next acts at once."""
    asked, before = [], {}

    def ask(number, _frame):
        asked.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # Python takes no handlers elsewhere
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
