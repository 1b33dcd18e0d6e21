"""Damages files."""

from hypothesis import strategies as st


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> bytes:
    """A file that was cut or changed somewhere."""
    # the middle, or the end, where archives have their table
    end = st.integers(1, min(len(data), 9000)).map(lambda i: len(data) - i)
    place = draw(st.integers(0, len(data) - 1) | end)
    change = draw(st.sampled_from(["cut", "flip", "flip", "bit", "bit", "zeros", "insert", "more"]))
    if change == "cut":
        return data[:place]
    if change == "flip":
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if change == "bit":
        return (
            data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        )
    if change == "zeros":
        length = min(draw(st.integers(1, 5000)), len(data) - place)
        return data[:place] + bytes(length) + data[place + length :]
    if change == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place:]
    return data + draw(st.binary(min_size=1, max_size=2000))
