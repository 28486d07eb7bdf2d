"""Server-sent events by the book (HTML standard, 9.2.6): bytes in, data of events out, whatever the pieces."""

import codecs
import re

_LINE_END = re.compile(rb"[\r\n]")


class Parser:
    """Incremental. Line ends are LF, CRLF or CR. Bytes that are not UTF-8 are counted and replaced."""

    def __init__(self):
        self._line = bytearray()
        self._data = None
        self._after_cr = False
        self.comments = 0
        self.bad_utf8 = 0

    def feed(self, piece):
        events = []
        position = 1 if self._after_cr and piece[:1] == b"\n" else 0
        self._after_cr = False if piece else self._after_cr
        while found := _LINE_END.search(piece, position):
            self._line += piece[position : found.start()]
            self._end_of_line(events)
            position = found.end()
            if found.group() == b"\r":
                if piece[position : position + 1] == b"\n":
                    position += 1
                self._after_cr = position == len(piece) and piece.endswith(b"\r")
        self._line += piece[position:]
        return events

    def _end_of_line(self, events):
        line = bytes(self._line)
        self._line.clear()
        if not line:
            if self._data is not None:
                events.append(self._text("\n".encode().join(self._data)))
            self._data = None
        elif line.startswith(b":"):
            self.comments += 1
        else:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data = self._data or []
                self._data.append(value[1:] if value.startswith(b" ") else value)

    def _text(self, data):
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.bad_utf8 += 1
            return data.decode(errors="replace")

    @property
    def inside_event(self):
        """Whether an event has begun that has not ended."""
        return bool(self._line) or self._data is not None


def splits_code_point(piece):
    """Whether `piece` ends inside a code point."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoder.decode(piece)
    return bool(decoder.getstate()[0])
