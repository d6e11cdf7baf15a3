"""Big batches in little memory: a batch is embedded in chunks, and once more when gradients flow back.

The loss needs all embeddings of a batch, but a chunk's activations are only needed while its gradient
is computed. So they are thrown away, and made again chunk by chunk, with the same random numbers: the
memory of one chunk, for 1.4 to 1.6 times the time of a step (15_scale, on two cores). Gao et al.,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983, call it
gradient cache. PyTorch's own `torch.utils.checkpoint` does it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def check_chunk(chunk: int | None, images: int) -> None:
    """Raise a ValueError if a batch of so many images cannot be cut into chunks of this size."""
    if chunk is None:
        return
    if chunk > images:
        raise ValueError(
            f"chunk = {chunk} is more than the {images} images of a batch in one process: lower it, or "
            "leave it out."
        )
    if images // _parts(images, chunk) < 2:
        raise ValueError(
            f"chunk = {chunk} leaves one of {images} images alone, and BatchNorm needs two: take "
            f"{chunk + 1}."
        )


def in_chunks(model: nn.Module, images: Tensor, chunk: int | None) -> Tensor:
    """Return the embeddings (B, D) of images (B, 3, H, W), as `model(images)` does.

    Their gradients are those of the whole batch. BatchNorm, in training, takes its batch statistics
    from each chunk, and its running statistics see each chunk once.

    Args:
        model: the network.
        images: of a batch, on its device.
        chunk: the most images at once, in equal parts; None: all of them.
    """
    if chunk is None:
        return model(images)
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _kept(model))}
    parts = images.tensor_split(_parts(len(images), chunk))
    # (B, 3, H, W) -> chunks -> (B, D)
    return torch.cat([checkpoint(model, part, **options) for part in parts])


def _parts(images: int, chunk: int) -> int:
    return -(-images // chunk)


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put back the buffers of a model: the second time, BatchNorm shall not count a chunk again."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
