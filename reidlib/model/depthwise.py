"""A depthwise convolution with a stride whose gradient is quick on the CPU. You need not read this.

PyTorch's own gradient is so slow there in bfloat16 that the few such convolutions of MobileNetV2 took
nearly half of its training step (`make bench` has both).
"""

import torch
from torch import Tensor, nn


def quicken_depthwise(network: nn.Module) -> None:
    """Make strided depthwise convolutions `StridedDepthwise`: weights, names and values stay."""
    convolutions = [m for m in network.modules() if type(m) is nn.Conv2d and max(m.stride) > 1]
    for conv in convolutions:
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        centred = conv.kernel_size == tuple(2 * p + 1 for p in conv.padding)
        plain = conv.bias is None and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        if depthwise and centred and plain:
            conv.__class__ = StridedDepthwise


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride, with a gradient that is quick on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ⌈H/stride⌉, ⌈W/stride⌉) of (B, C, H, W)."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or self.bias is not None:
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):  # which looks for the names of PyTorch's own functions
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return _QuickGradient.apply(x, weight, self.stride, self.padding)


class _QuickGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        # The gradient at the places that the stride left out is 0; with those, the stride is 1,
        # and the gradient of x is a forward convolution with the kernel turned round.
        spread = torch.zeros_like(x)
        spread[:, :, :: ctx.stride[0], :: ctx.stride[1]] = gradient
        turned = weight.flip(2, 3)
        for_x = nn.functional.conv2d(spread, turned, None, 1, ctx.padding, groups=len(weight))
        options = {"stride": ctx.stride, "padding": ctx.padding, "groups": len(weight)}
        for_weight = nn.grad.conv2d_weight(x, weight.shape, gradient, **options)
        return for_x, for_weight, None, None
