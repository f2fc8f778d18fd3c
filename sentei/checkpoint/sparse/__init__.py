"""The sparse container: `model.sparse.safetensors`, bit-exact, read without trust in what it says.

A plain safetensors file. Its metadata hold `format`, `version` and `manifest` (JSON: codec, bytes and crc32 of the
tensor `::manifest`). That tensor is JSON: "tensors", name -> layout, dtype, shape, nnz, bits, codecs, crc32; "scales",
their codec; "activations", module -> ranges of its inputs and outputs. A tensor N of shape S, with R = prod(S[:-1])
rows of C = S[-1], is stored in one layout:

dense     N
bitmask   N::bits, which of [R, C] are kept; N::vals [nnz], row by row
block4    N::bits, which of [R, C/4] blocks are kept, W = C/4 a row; N::vals [blocks, 4]

and the mask [R, W] in one form:

rows, columns           uint8 [R, ceil(W/8)], bit j of byte b is column 8b+j, padding 0; or the same of its transpose
row gaps, column gaps   uint8 [n], for each kept one how many in a row before it are not; 255: so many, and go on

An int8 tensor holds codes; its value is code * scale, with fp32 scales [] or [R]: those of all tensors, in order, are
the tensor `::scales`. crc32 is of the dense bytes, then those of the scale. Each part may be one zstd frame (uint8,
one-dimensional), with codec "planes" of the first bytes of all numbers, then the second ones and so on. The sizes of
parts are known from the shapes.

Version 1, still read: the manifest is metadata itself, masks are by rows, no planes, N::scale fp32 is beside its tensor
and outside its crc32, and ranges are tensors `act/<module>::name`.

The name is not model.safetensors, so that transformers says there are no weights rather than filling in random ones.

Shape legend: R rows, C columns, W = C or, in blocks, C/4.
"""

from sentei.checkpoint.sparse.decoding import read, read_activations, read_codes, read_masks
from sentei.checkpoint.sparse.encoding import byte_table, size, write
from sentei.checkpoint.sparse.format import FILE, MASKS, Entry, inspect, limit

__all__ = [
    "FILE",
    "MASKS",
    "Entry",
    "byte_table",
    "inspect",
    "limit",
    "read",
    "read_activations",
    "read_codes",
    "read_masks",
    "size",
    "write",
]
