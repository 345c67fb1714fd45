"""What is packed is what is read, bit for bit, wherever the memory lies and however often it grows."""

import pytest
import torch

from megarl.rollout.transfer import Bucket, SharedMemory, bucketfuls, checksum, content, land

SHAPES = [(3, 5), (1,), (64, 7), (2, 3, 4)]


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {str(shape): torch.randn(shape, generator=generator) for shape in SHAPES}


def read(message):
    memory = torch.from_numpy(content(message))
    assert checksum(memory) == message["checksum"]
    for entry in message["entries"]:
        dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
        start = entry["offset"]
        yield entry["name"], memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_read_is_what_was_packed(dtype):
    bucket, given = Bucket(dtype), tensors()
    given["transposed"] = given["(64, 7)"].t()
    for _ in range(2):  # the memory grows the first time alone
        found = dict(read(bucket.pack(given.items())))
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], tensor.to(dtype or tensor.dtype)) for name, tensor in given.items())
    assert bucket.pack([]) is None
    bucket.close()


def test_what_comes_by_another_way_is_read_from_where_it_lands():
    bucket, memory = Bucket(), SharedMemory()
    for size in (1, 4, 2):
        given = dict(list(tensors().items())[:size])
        message = bucket.pack(given.items())
        landed = land(message, content(message).copy(), memory)
        assert landed["path"] != message["path"]
        assert all(torch.equal(tensor, given[name]) for name, tensor in read(landed))
    bucket.close()
    memory.close()


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 1, 1, 1]), (64, [2, 1, 1]), (10**6, [4])])
def test_a_bucketful_is_not_larger_than_asked_unless_a_single_tensor_is(size, expected):
    parts = list(bucketfuls(tensors().items(), size))
    assert [len(part) for part in parts] == expected
    assert [name for part in parts for name, _ in part] == list(tensors())
