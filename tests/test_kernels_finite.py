"""How many values are not finite, as codecs of every type count them, against torch."""

import pytest
import torch

from dear import _C


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("numel", [1, 31, 4096, 4097, 100_003])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_counted_as_torch_counts(numel, share, dtype):
    torch.manual_seed(numel)
    values = torch.randn(numel).mul_(torch.finfo(dtype).max / 8).to(dtype)
    spoiled = torch.rand(numel) < share
    values[spoiled] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)[torch.randint(3, (numel,))][spoiled]
    before = values.clone()
    codec = _C.DenseCodec(torch.device("cpu"), 0, 1)
    codec.bind(values, values)
    codec.advance(0, 0)
    assert codec.dropped().tolist() == [int((~values.isfinite()).sum())]
    codec.advance(0, 2)
    nonfinite = codec.nonfinite()
    assert nonfinite is not None and nonfinite.tolist() == codec.dropped().tolist()
    assert torch.equal(values.isnan(), before.isnan()) and torch.equal(values.nan_to_num(), before.nan_to_num())
