"""Records of operations from planes to planes that are no convolutions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .kernels import library
from .kernels.plane_resampling import RESAMPLINGS
from .planes import Planes
from .steps import Operation


class OperationRecord:
    """Fills the record of an operation, see `kernels.records.PLANE_OPERATION`.

    Args:
        record: the record.
        step: the operation.
        batch: number of samples.
        first_pixel: returns the address of the first pixel of planes.
        address: returns the address of an array, which it keeps alive.

    Attributes:
        kernel: name of the kernel.
        items: number of items of the kernel.

    Example:
        >>> from torch_feather.runtime.kernels import PLANE_OPERATION
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> x, out = (Planes(PlaneLayout(n, n), 8, n, n, (8, n, n)) for n in (3, 1))
        >>> step, record = Operation("mean", (x,), out), np.zeros((), PLANE_OPERATION)
        >>> OperationRecord(record, step, 2, lambda planes: 0, lambda array: 0).items
        8
    """

    def __init__(
        self,
        record: np.ndarray,
        step: Operation,
        batch: int,
        first_pixel: Callable[[Planes], int],
        address: Callable[[np.ndarray], int],
    ) -> None:
        self.record, self.step, self.batch, self._address = record, step, batch, address
        (x, *others), out = step.x, step.out
        self.x, self.source, self.layout = x, x.layout.root(), out.layout.root()
        self.kernel, self.items = step.name, out.channels
        record["x"], record["out"] = first_pixel(x), first_pixel(out)
        record["images"], record["channels"] = batch, x.channels
        record["pixels"], record["x_image"] = self.source.image_stride, self.source.image_stride
        record["x_plane"], record["plane"] = x.channel_stride(batch), out.channel_stride(batch)
        record["image"] = self.layout.image_stride
        record["lead_bytes"], record["eps"] = 4 * self.layout.lead, step.eps
        record["rows"], record["columns"] = out.height, out.width
        record["x_pitch"], record["pitch"] = self.source.row_stride, self.layout.row_stride
        if others:
            record["y"] = first_pixel(others[0])
            record["y_plane"] = others[0].channel_stride(batch)
            record["y_image"] = others[0].layout.root().image_stride
        if (mask := out.mask(batch)) is not None:
            record["mask"] = address(mask)
            if step.name in ("scale", "group_norm"):
                self.kernel = f"{step.name}_masked"
        if (fill := FILL.get(step.name)) is not None:
            fill(self)

    def _mean(self) -> None:
        self.record["factor"] = 1 / (self.x.height * self.x.width)
        self.record["pixels"] = self.x.height * self.source.row_stride

    def _interleave(self) -> None:
        rows, columns = self.step.stride
        self.record["x_group"] = rows * columns * self.record["x_plane"]
        self.record["x_part"], self.record["factor_rows"] = self.record["x_plane"], rows
        self.kernel = f"interleave_{columns}"

    def _repeat(self) -> None:
        rows, columns = self.step.stride
        self.record["x_group"], self.record["factor_rows"] = self.record["x_plane"], rows
        self.kernel = f"interleave_{columns}"

    def _gather(self) -> None:
        assert self.step.index is not None
        self.record["index"] = self._address(self.step.index)
        self.record["pixels"] = self.step.index.shape[1]

    def _resample(self) -> None:
        assert self.step.index is not None
        assert self.step.weight is not None
        self.record["index"] = self._address(self.step.index)
        self.record["weight"] = self._address(self.step.weight)
        self.record["taps"] = len(self.step.index)

    def _activate(self) -> None:
        assert self.step.activation is not None
        width = library().target.widths[0]
        self.record["activation"] = library().activation(self.step.activation, width)

    def _scale_pixels(self) -> None:
        assert self.step.weight is not None
        self.record["weight"] = self._address(self.step.out.spread(self.step.weight, self.batch))

    def _affine(self) -> None:
        assert self.step.weight is not None
        assert self.step.bias is not None
        self.record["weight"] = self._address(self.step.weight)
        self.record["bias"] = self._address(self.step.bias)

    def _over_channels(self) -> None:
        """The items are vectors of pixels."""
        self.items = self.step.out.channel_stride(self.batch) // library().target.widths[0]

    def _layer_norm(self) -> None:
        self._affine()
        self._over_channels()
        self.record["factor"] = 1 / self.x.channels

    def _group_norm(self) -> None:
        self._affine()
        groups, pixels = self.step.groups, self.x.height * self.x.width
        self.record["channels"], self.items = self.x.channels // groups, groups
        self.record["factor"] = groups / (self.x.channels * pixels)


# Functions that fill what only some operations need.
FILL: dict[str, Callable[[OperationRecord], None]] = {
    "mean": OperationRecord._mean,
    "interleave": OperationRecord._interleave,
    "repeat": OperationRecord._repeat,
    "gather": OperationRecord._gather,
    "activate": OperationRecord._activate,
    "scale_pixels": OperationRecord._scale_pixels,
    "layer_norm": OperationRecord._layer_norm,
    "group_norm": OperationRecord._group_norm,
    **dict.fromkeys(("softmax", "log_softmax"), OperationRecord._over_channels),
    **dict.fromkeys(RESAMPLINGS, OperationRecord._resample),
}
