"""Samples come back from bytes equal in every bit of every field, and bytes that are none of ours are refused."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import struct
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batch import Prompt, Sample
from megatron_rl.batch.record_bytes import DTYPES, RecordBytesError, from_bytes, to_bytes

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.booleans()), inner)
    ),
    max_leaves=20,
)


def bits(value: Any) -> Any:
    """``value`` with its types, floats as their 64 bits, dicts in their order: equal only if all of it is."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [bits(item) for item in value]
    if isinstance(value, dict):
        return [(bits(key), bits(item)) for key, item in value.items()]
    if dataclasses.is_dataclass(value):
        return type(value).__name__, [(f.name, bits(getattr(value, f.name))) for f in dataclasses.fields(value)]
    return type(value).__name__, value


@given(PLAIN)
def test_plain_values_come_back_with_type_order_and_every_bit(value):
    assert bits(from_bytes(to_bytes(value))) == bits(value)


@given(
    st.lists(st.integers()),
    st.lists(st.floats()),
    st.dictionaries(st.text(), PLAIN),
    st.lists(st.tuples(st.integers(0), st.integers(0))),
    st.none() | st.floats(),
    PLAIN,
)
def test_samples_come_back_equal_in_every_field(token_ids, logprobs, metadata, spans, reward, answer):
    prompt = Prompt(token_ids, "text", answer, metadata, index=7)
    sample = Sample(
        prompt, token_ids, logprobs, "\ud800 text", [1] * len(token_ids), "length", 3, spans, 2, reward, {"a": 0.1},
        metadata, [(4, "<x>")], 0.25,
    )  # fmt: skip
    assert all(getattr(sample, f.name) is not None for f in dataclasses.fields(Sample) if f.name != "reward")
    assert bits(from_bytes(to_bytes(sample))) == bits(sample)


def test_the_prompt_of_a_group_is_written_once_and_is_one_object_again():
    prompt = Prompt(list(range(10_000)))
    group = [Sample(prompt, [index], [-0.5]) for index in range(8)]
    data = to_bytes(group)
    assert len(data) < 2 * 10_000 * 8
    found = from_bytes(data)
    assert len({id(sample.prompt) for sample in found}) == 1
    assert found == group
    alone = from_bytes(to_bytes([Sample(copy.deepcopy(prompt), [0], [0.0]) for _ in range(2)]))
    assert alone[0].prompt is not alone[1].prompt


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_dtype_come_back_bit_for_bit(name):
    random = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    tensor = (random % 2).bool() if name == "bool" else random.view(DTYPES[name])
    for case in (tensor, tensor.T, tensor[1:1], tensor[0, 0]):
        found = from_bytes(to_bytes(case))
        assert (found.dtype, found.shape) == (case.dtype, case.shape)
        assert found.contiguous().reshape(-1).view(torch.uint8).tolist() == case.contiguous().reshape(-1).view(
            torch.uint8
        ).tolist()  # fmt: skip


def test_arrays_and_numpy_scalars_come_back():
    for value in (np.arange(6, dtype="<i2").reshape(2, 3).T, np.zeros((0, 3), ">f4"), np.array(1.5), np.array([True])):
        found = from_bytes(to_bytes(value))
        assert type(found) is np.ndarray
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
    for scalar in (np.float64(0.1), np.int32(-3), np.bool_(True)):
        found = from_bytes(to_bytes(scalar))
        assert type(found) is type(scalar)
        assert found == scalar


@pytest.mark.parametrize("value", [datetime(2026, 11, 27), {1}, object(), np.array([object()]), bytearray(b"x")])
def test_other_types_are_refused_by_the_place_where_they_are(value):
    sample = Sample(Prompt([1], metadata={"rows": [0, value]}), [1], [0.0])
    with pytest.raises(RecordBytesError, match=r"^\[0\].prompt.metadata\['rows'\]\[1\] is a \w+\.\w+: expected None"):
        to_bytes([sample])


def test_a_class_of_the_same_name_is_not_ours():
    @dataclasses.dataclass
    class Sample:
        x: int = 0

    with pytest.raises(RecordBytesError, match=r"is a .*Sample: expected"):
        to_bytes(Sample())


SAMPLE = to_bytes([Sample(Prompt([1, 2], metadata={"t": torch.arange(3)}), [1], [0.5], metadata={"a": np.arange(2)})])


def test_bytes_cut_anywhere_are_refused():
    for size in range(len(SAMPLE)):
        with pytest.raises(RecordBytesError, match="not readable at byte"):
            from_bytes(SAMPLE[:size])
    with pytest.raises(RecordBytesError, match="1 bytes are left over"):
        from_bytes(SAMPLE + b"N")


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_changed_bytes_are_read_as_plain_values_or_refused(place, change):
    changed = bytearray(SAMPLE)
    changed[place] ^= change
    with contextlib.suppress(RecordBytesError):
        from_bytes(bytes(changed))


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the file was run",))


@given(st.binary())
def test_neither_pickles_nor_other_bytes_are_run(data):
    for foreign in (pickle.dumps(Exploit()), data, b"l" + struct.pack("<Q", 1) * 2, b"t" + b"\xff" * 8):
        with pytest.raises(RecordBytesError):
            from_bytes(foreign + b"\0")
