"""What few bits leave of a tensor, by the library's kernels: a step for each block of 128 elements."""

import torch
from torch import Tensor

BLOCK = 128
EXACT = 32
#: Bits of an element with its share of a step or scale, by what was asked for.
ON_THE_WIRE = {32: 32.0, 16: 16.0, 8: 8 + 8 / BLOCK, **{bits: bits + 16 / BLOCK for bits in (2, 3, 4)}}


def rounded(values: Tensor, bits: int) -> Tensor:
    """float32, of the same shape. bits: one of ON_THE_WIRE."""
    if bits == EXACT:
        return values
    if bits == 16:
        return values.bfloat16().float()
    from compress import ops  # here, since strategies are named where this library is not built, too

    flat = values.reshape(-1).contiguous()
    shard, out, dropped = ops.quantize_shard_numel(flat.numel()), torch.empty_like(flat), torch.zeros(1).int()
    if bits == 8:
        payload = torch.zeros(1, ops.quantize_payload_numel(shard), dtype=torch.int32)
        ops.quantize_encode(flat, None, shard, payload, dropped)
        ops.quantize_decode(payload, shard, out)
    else:
        payload = torch.zeros(1, ops.levels_payload_numel(shard, bits), dtype=torch.int32)
        ops.levels_encode(flat, None, shard, payload, dropped, bits)
        ops.levels_decode(payload, shard, out, bits)
    return out.view_as(values)
