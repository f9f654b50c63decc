"""Tables that Python fills and machine code reads.

Each field takes 8 bytes. A float32 value is stored in the lower half; a field whose name ends in
an underscore is the unused upper half of the field before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Arguments of a convolution kernel. All pointers are addresses.
CONVOLUTION = np.dtype(
    [
        ("x", "i8"),  # first pixel of the input
        ("taps", "i8"),  # for each tap an int32 offset in pixels, then a weight per channel
        ("rows", "i8"),  # int32 (groups + 1,): first tap of each group of output channels
        ("channels", "i8"),  # int32 (out,): output channels in the order of the groups
        ("bias", "i8"),
        ("out", "i8"),
        ("residual", "i8"),
        ("mask", "i8"),  # int32: all bits set at pixels of an image, 0 between images
        ("blocks", "i8"),  # int64 (n_blocks + 1,): first group of each block of groups
        ("inner", "i8"),  # iterations of the inner loop: all tiles, or all blocks
        ("by_block", "i8"),  # whether the inner loop is over the tiles of a block
        ("plane", "i8"),  # pixels between consecutive channels of out and residual
        ("last", "i8"),  # first pixel of the last tile, which may overlap the previous tile
        ("tail", "i8"),  # vectors after the last tile that are set to 0, in each channel
        ("lead", "i8"),  # memory before the first pixel of out, which is set to 0
        ("lead_bytes", "i8"),
        ("trail", "i8"),  # memory after the last pixel of out, which is set to 0
        ("trail_bytes", "i8"),
        ("low", "f4"),  # lower bound of the result
        ("low_", "f4"),
        ("high", "f4"),  # upper bound of the result
        ("high_", "f4"),
        ("activation", "i8"),  # function of rows that is applied to the result, or 0
    ]
)

# Arguments of the kernels in `plane_operations`.
PLANE_OPERATION = np.dtype(
    [
        ("x", "i8"),  # first pixel of the input
        ("y", "i8"),  # first pixel of the second input: factors of `scale`
        ("out", "i8"),  # first pixel of the result
        ("mask", "i8"),  # int32: all bits set at pixels of an image, 0 between images; or 0
        ("activation", "i8"),  # function of rows
        ("weight", "i8"),  # of a norm, one number per channel; or of rows or columns
        ("bias", "i8"),
        ("index", "i8"),  # of `gather`, int32 (groups, pixels): pixels of x; or rows or columns
        ("taps", "i8"),  # rows or columns of x that are combined
        ("images", "i8"),
        ("channels", "i8"),
        ("x_plane", "i8"),  # pixels between consecutive channels of x
        ("x_image", "i8"),  # pixels between consecutive images of x
        ("y_plane", "i8"),
        ("y_image", "i8"),
        ("plane", "i8"),  # pixels between consecutive channels of out
        ("image", "i8"),
        ("pixels", "i8"),  # of an image, including padding
        ("rows", "i8"),  # rows and columns of an image of out
        ("columns", "i8"),
        ("x_pitch", "i8"),  # pixels between consecutive rows of x
        ("x_group", "i8"),  # pixels between the channels of x for consecutive channels of out
        ("x_part", "i8"),  # pixels between the channels of x that are interleaved
        ("pitch", "i8"),  # pixels between consecutive rows of out
        ("factor_rows", "i8"),  # rows of out for each row of x
        ("lead_bytes", "i8"),  # memory before the first pixel of out, which is set to 0
        ("factor", "f4"),  # 1 / number of pixels of an image, or 1 / channels
        ("factor_", "f4"),
        ("eps", "f4"),  # of a norm
        ("eps_", "f4"),
    ]
)

# Arguments of the kernel of attention. Queries and keys are tokens; a sequence has as many of them,
# next to each other in each channel, in all heads. Channels of a head follow each other.
ATTENTION = np.dtype(
    [
        ("q", "i8"),  # first token of the first channel
        ("k", "i8"),
        ("v", "i8"),
        ("out", "i8"),
        ("mask", "i8"),  # float32, added to the scores; queries are adjacent; or 0
        ("scratch", "i8"),  # memory of all threads
        ("scratch_size", "i8"),  # float32 values of one thread
        ("threads", "i8"),
        ("items", "i8"),  # blocks · heads · sequences
        ("blocks", "i8"),  # of the queries of a sequence
        ("heads", "i8"),
        ("queries", "i8"),  # of a sequence
        ("keys", "i8"),  # of a sequence
        ("depth", "i8"),  # channels of a head of q and k
        ("v_depth", "i8"),  # channels of a head of v and out
        ("q_plane", "i8"),  # tokens between consecutive channels
        ("k_plane", "i8"),
        ("v_plane", "i8"),
        ("out_plane", "i8"),
        ("masks", "i8"),  # masks of sequences; the next sequence after them has the first one
        ("mask_sequence", "i8"),  # numbers between the masks of consecutive sequences
        ("mask_head", "i8"),
        ("mask_key", "i8"),
        ("causal", "i8"),  # 1 if keys after their query are masked
        ("scale", "f4"),  # factor of the scores
        ("scale_", "f4"),
    ]
)

# Arguments of the kernels that transpose between planes and tokens, whose channels are adjacent.
TRANSPOSE = np.dtype(
    [
        ("source", "i8"),
        ("out", "i8"),
        ("rows", "i8"),  # of the source: tokens, or channels of planes
        ("columns", "i8"),  # adjacent numbers in a row of the source
        ("pitch", "i8"),  # numbers between consecutive rows of the source
        ("out_pitch", "i8"),  # between consecutive rows of the result, which are columns
    ]
)

# Arguments of a kernel that copies a tensor into planes, split into phases. Strides of the source
# are in float32 values.
COPY = np.dtype(
    [
        ("source", "i8"),  # address of the first pixel
        ("source_image", "i8"),  # stride between images
        ("source_channel", "i8"),
        ("source_row", "i8"),  # stride between rows of one phase
        ("source_column", "i8"),
        # int64 (n, 5): first pixel in the source, rows, columns, first pixel in the output, and
        # the pixel there up to which the rest of the channel is filled
        ("phases", "i8"),
        ("n_phases", "i8"),
        ("out", "i8"),  # address of the first pixel
        ("images", "i8"),
        ("channels", "i8"),  # of the source
        ("plane", "i8"),  # pixels between consecutive channels of out
        ("image", "i8"),  # pixels between consecutive images
        ("pitch", "i8"),  # pixels between consecutive rows
        ("rows", "i8"),  # rows of an image, including padding
        ("edge", "i8"),  # pixels before the first and after the last channel
        ("all_channels", "i8"),  # of out
        ("fill", "f4"),  # value of the padding
        ("fill_", "f4"),
    ]
)

# Arguments of the kernels in `recurrence`, for one direction of a layer. All strides are in float32
# values; that between steps is negative for the direction that goes back in time.
RECURRENCE = np.dtype(
    [
        ("g", "i8"),  # input products of the first sample and step: planes, one per row
        ("g_plane", "i8"),
        ("out", "i8"),  # result of the first sample and step: planes, one per unit
        ("out_plane", "i8"),
        ("sample", "i8"),  # pixels between consecutive samples of g and out
        ("time", "i8"),  # pixels between consecutive steps
        ("taps", "i8"),  # for each tap the int32 offset of its value in h, then a weight
        ("first", "i8"),  # int32 (rows + 1,): first tap of each row
        ("at", "i8"),  # int32 (rows,): where the row is in gates
        ("bias", "i8"),  # of the rows after the first g_rows ones
        ("rows", "i8"),
        ("g_rows", "i8"),
        ("gates", "i8"),  # memory of 4 sections
        ("section", "i8"),  # float32 values of a section: whole vectors
        ("h", "i8"),  # memory of a section, and a row of zeros
        ("c", "i8"),  # memory of a section
        ("sigmoid", "i8"),  # functions of rows
        ("tanh", "i8"),
        ("steps", "i8"),
        ("samples", "i8"),
        ("lanes", "i8"),  # samples, rounded up to whole vectors
        ("units", "i8"),
        ("h_initial", "i8"),
        ("h_initial_sample", "i8"),
        ("h_initial_unit", "i8"),
        ("c_initial", "i8"),
        ("c_initial_sample", "i8"),
        ("c_initial_unit", "i8"),
        ("h_final", "i8"),
        ("h_final_sample", "i8"),
        ("h_final_unit", "i8"),
        ("c_final", "i8"),
        ("c_final_sample", "i8"),
        ("c_final_unit", "i8"),
    ]
)

# One operation of a program: addresses of a kernel and its record, and the number of work items.
OPERATION = np.dtype([("kernel", "i8"), ("record", "i8"), ("items", "i8")])


def fields(record: np.dtype) -> Iterator[tuple[str, int]]:
    """Yield the name and byte offset of each field of a record, without the unused halves.

    Example:
        >>> list(fields(OPERATION))
        [('kernel', 0), ('record', 8), ('items', 16)]
    """
    for name in record.names or ():
        if not name.endswith("_"):
            yield name, record.fields[name][1]  # type: ignore[index]
