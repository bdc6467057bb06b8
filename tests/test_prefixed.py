"""Messages on a stream of bytes come out as they went in, however the stream was cut."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prefixed import Unpacker, pack


@given(st.lists(st.binary(max_size=300)), st.lists(st.integers(1, 200), min_size=1))
def test_any_cut_gives_the_same_messages(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(pack, messages))
    unpacker, found, start = Unpacker(), [], 0
    while start < len(stream):
        end = start + cuts[start % len(cuts)]
        found += unpacker.feed(stream[start:end])
        start = end
    assert found == messages


def test_an_unfinished_message_waits() -> None:
    unpacker = Unpacker()
    assert unpacker.feed(pack(b"whole") + pack(b"half")[:-1]) == [b"whole"]
    assert unpacker.feed(b"f") == [b"half"]
