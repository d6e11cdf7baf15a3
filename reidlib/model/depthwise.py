"""A depthwise convolution with a stride whose gradient is quick on the CPU. You need not read this.

PyTorch's own gradient is so slow there in bfloat16 that the few such convolutions of MobileNetV2 took
nearly half of its training step (`make bench` has both).
"""

import torch
from torch import Tensor, nn


def quicken_depthwise(network: nn.Module) -> None:
    """Replace the strided depthwise convolutions of a network by `StridedDepthwise`, in place.

    The weights are the same tensors under the same names, and so are the values computed.
    """
    for name, module in [*network.named_modules()]:
        if _is_strided_depthwise(module):
            network.set_submodule(name, StridedDepthwise.of(module))


def _is_strided_depthwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and max(module.stride) > 1
        and module.groups == module.in_channels == module.out_channels
        and module.bias is None
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and module.kernel_size == tuple(2 * p + 1 for p in module.padding)
    )


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride, with a gradient that is quick on the CPU."""

    @classmethod
    def of(cls, plain: nn.Conv2d) -> "StridedDepthwise":
        """Return one that shares the weight of a plain convolution."""
        sizes = (plain.in_channels, plain.out_channels, plain.kernel_size)
        options = {"stride": plain.stride, "padding": plain.padding, "groups": plain.groups}
        # On "meta" nothing is drawn at random: what is drawn later stays the same for a seed.
        quick = cls(*sizes, **options, bias=False, device="meta")
        quick.weight = plain.weight
        return quick

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ⌈H/stride⌉, ⌈W/stride⌉) of (B, C, H, W)."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or self.bias is not None:
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):  # which looks for the names of PyTorch's own functions
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return _StridedDepthwise.apply(x, weight, self.stride, self.padding)


class _StridedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        for_x = None
        if ctx.needs_input_grad[0]:
            # The gradient at the places that the stride left out is 0; with those, the stride is 1,
            # and the gradient of x is a forward convolution with the kernel turned round.
            spread = torch.zeros_like(x)
            spread[:, :, :: ctx.stride[0], :: ctx.stride[1]] = gradient
            turned = weight.flip(2, 3)
            for_x = nn.functional.conv2d(spread, turned, None, 1, ctx.padding, groups=len(weight))
        # PyTorch's gradient of the weight is quick.
        options = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), len(weight))
        for_weight = torch.ops.aten.convolution_backward(
            gradient, x, weight, *options, (False, ctx.needs_input_grad[1], False)
        )[1]
        return for_x, for_weight, None, None
