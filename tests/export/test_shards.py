"""The streaming writer against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from export.handmade import matrix
from octavo.export.shards import ShardWriter, Written

TENSORS = {
    "odd bytes": torch.arange(3, dtype=torch.uint8),
    "wide": matrix(3, 5),
    "fp8": matrix(7).to(torch.float8_e4m3fn),
    "half": matrix(2, 2, 2).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "long": torch.tensor([1 << 40]),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False, True]),
    "strided": matrix(4, 6).T,
    "päram": torch.ones(1, dtype=torch.int8),
}


def write(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **options: object) -> Written:
    directory.mkdir(parents=True, exist_ok=True)
    with ShardWriter(directory, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in (TENSORS if tensors is None else tensors).items():
            writer.add(name, tensor)
        return writer.close()


def test_the_library_reads_what_the_stream_wrote(tmp_path: Path) -> None:
    written = write(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].contiguous().view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert written.tensor_bytes == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, max_shard_bytes=100)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) > 2
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_shards_stay_below_the_limit_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    tensors = {f"t{number}": matrix(4, 4, seed=number) for number in range(5)}
    written = write(tmp_path, tensors, max_shard_bytes=130)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == written.weight_map
    assert index["metadata"]["total_size"] == 5 * 64
    assert sorted(set(written.weight_map.values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for name, file in written.weight_map.items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensors[name])


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    written = write(tmp_path, {"a": matrix(1), "b": matrix(100), "c": matrix(1)}, max_shard_bytes=50)
    assert [name[6:11] for name in written.weight_map.values()] == ["00001", "00002", "00003"]


def test_nothing_at_all_is_a_valid_file(tmp_path: Path) -> None:
    assert write(tmp_path, {}).tensor_bytes == 0
    assert load_file(tmp_path / "model.safetensors") == {}


def test_a_single_shard_can_have_an_index(tmp_path: Path) -> None:
    write(tmp_path, {"a": matrix(1)}, always_index=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model.safetensors"}


def test_a_name_used_twice_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("a", matrix(1))
        with pytest.raises(ValueError, match="'a' was written before: two layers claim the same name"):
            writer.add("a", matrix(1))


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path) as writer,
        pytest.raises(ValueError, match=r"'a': safetensors cannot hold torch\.complex64"),
    ):
        writer.add("a", torch.zeros(1, dtype=torch.complex64))
