"""Parsers and scripted bytes: what the harness says and how it reads."""

import asyncio
import shutil
import tempfile
import unittest

import answers
import h2
import resolver
import sse
from case import CASES, made
from client import WORDS, Answer, _event, body_of, status_of, text_of
from subjects import penstock
from subjects.base import Route, Subject


def read(parts):
    """What a caller makes of the pieces of a body."""
    answer, parser = Answer("q", True, 0.0), sse.Parser()
    for part in parts:
        for data in parser.feed(part):
            _event(answer, data)
    answer.bad_utf8 = parser.bad_utf8
    return answer


class Events(unittest.TestCase):
    def test_every_split_and_line_end_gives_the_same_events(self):
        for end in (b"\n", b"\r\n", b"\r"):
            text = b": c" + end + end + b"data: a" + end + b"data:b" + end + end + "data: é漢".encode() + end + end
            whole = sse.Parser()
            events = whole.feed(text)
            self.assertEqual(events, ["a\nb", "é漢"])
            for at in range(1, len(text)):
                parser = sse.Parser()
                self.assertEqual(parser.feed(text[:at]) + parser.feed(text[at:]), events)
            parser = sse.Parser()
            self.assertEqual([e for byte in text for e in parser.feed(bytes([byte]))], events)

    def test_an_event_without_its_blank_line_is_none(self):
        parser = sse.Parser()
        self.assertEqual(parser.feed(b"data: a\n"), [])
        self.assertTrue(parser.inside_event)

    def test_good_shapes_are_read_whole(self):
        for shape in ("crlf", "lone_cr", "no_space", "comments", "many_in_one"):
            answer = read(answers.BODIES[shape]("alpha"))
            self.assertEqual((answer.text, answer.finish, answer.done), (text_of(WORDS), "stop", True), shape)
        wide = read(answers.split_code_points("alpha"))
        self.assertEqual(wide.text.replace(answers.WIDE, ""), text_of(WORDS))

    def test_bad_shapes_are_seen_as_such(self):
        self.assertEqual(read(answers.bad_utf8("alpha")).bad_utf8, 1)
        self.assertIsNotNone(read(answers.error_after_empty("alpha")).error)
        self.assertEqual(read(answers.aborted("alpha")).finish, "abort")
        first = answers.endless_event("alpha")
        self.assertGreater(sum(len(next(first)) for _ in range(5)), 200_000)


class Bytes(unittest.TestCase):
    def test_http2_frames(self):
        self.assertEqual(h2.frame(h2.PING, h2.ACK, 0, b"12345678"), b"\0\0\x08\x06\x01\0\0\0\x00" + b"12345678")
        self.assertEqual(h2.settings(_4=0), b"\0\0\x06\x04\0\0\0\0\0" + b"\0\x04\0\0\0\0")

    def test_long_header_fields(self):
        for size, head in ((126, b"\x7e"), (127, b"\x7f\x00"), (255, b"\x7f\x80\x01"), (1337, b"\x7f\xba\x09")):
            self.assertEqual(h2.literal(b"a", b"x" * size), b"\0\x01a" + head + b"x" * size)

    def test_statuses_of_http2(self):
        for block, status in (
            (b"\x88rest", 200), (b"\x3f\xe1\x1f\x8c", 400), (b"\x20\x8c", 400), (b"\x48\x03502", 502),
            # RFC 7541, C.6.1 and C.6.2: 302 and 307 in Huffman codes.
            (b"\x48\x82\x64\x02", 302), (b"\x48\x83\x64\x0e\xff", 307), (b"\x08\x03431", 431), (b"", None),
            (b"\x48", None), (b"\x48\x03ab", None), (b"\x82", None),
        ):  # fmt: skip
            self.assertEqual(h2.status_of(block), status, block)

    def test_outcomes_of_http2_streams(self):
        async def outcomes():
            found = []
            for kind, payload in (
                (h2.HEADERS, b"\x8c"), (h2.RST_STREAM, b"\0\0\0\x01"), (h2.GOAWAY, bytes(8)), (h2.PING, bytes(8)),
            ):  # fmt: skip

                async def serve(reader, writer, kind=kind, payload=payload):
                    stream = 1 if kind in (h2.HEADERS, h2.RST_STREAM) else 0
                    writer.write(h2.settings() + h2.frame(kind, 0, stream, payload))
                    try:
                        while await reader.read(4096):
                            pass
                    except ConnectionError:
                        pass
                    writer.close()
                    done.set()

                done = asyncio.Event()
                server = await asyncio.start_server(serve, "127.0.0.1", 0)
                connection = await h2.Connection().open(server.sockets[0].getsockname()[1])
                found.append(await connection.outcome(1, 5.0 if kind != h2.PING else 0.2))
                await connection.close()
                await done.wait()
                server.close()
                await server.wait_closed()
            return found

        expected = [(400, "answered"), (None, "reset"), (None, "closed"), (None, "timeout")]
        self.assertEqual(asyncio.run(outcomes()), expected)

    def test_dns_answers(self):
        server = resolver.Resolver()
        server.addresses["a.test"] = ["127.0.1.1", "127.0.1.2"]
        question = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x04test\0\0\x01\0\x01"
        reply = server.reply(question)
        self.assertEqual(reply[:2] + reply[6:8], b"\x12\x34\0\x02")
        self.assertTrue(reply.endswith(bytes([127, 0, 1, 2])))
        server.mode = "nxdomain"
        self.assertEqual(server.reply(question)[3] & 0xF, resolver.NXDOMAIN)

    def test_status_and_body(self):
        self.assertEqual(status_of(b"HTTP/1.1 431 Too Large\r\n"), 431)
        self.assertIsNone(status_of(b""))
        self.assertIn(b"[id=q7]", body_of("m", "q7", True))


class Catalogue(unittest.TestCase):
    def test_every_case_is_there_and_its_routes_have_names_of_their_own(self):
        import cases  # noqa: F401

        wanted = {f"S{n:02}" for n in range(1, 17)}
        wanted |= {f"R{n:02}" for n in (*range(1, 11), *range(12, 19), 33, 34)}
        self.assertEqual(set(CASES), wanted)
        names = [template["name"] for case in CASES.values() for template in case.routes]
        self.assertEqual(len(names), len(set(names)))
        addresses = dict.fromkeys(("alpha", "beta", "gamma", "hole"), "127.0.0.1:1")
        for case in CASES.values():
            for template in case.routes:
                made(template, addresses)


class Objects(unittest.TestCase):
    def test_routes_become_rules_with_what_sets_them_apart(self):
        targets = (("alpha", "127.0.0.1:1001"), ("beta", "127.0.0.1:1002"))
        plain, together = Route("p", targets, mode="pool"), Route("t", targets, mode="pool", together=True)
        text = penstock.objects([plain, together, Route("u", targets, mode="pool", urgency="High")])
        self.assertEqual(text.count("kind: LLMBackend"), 3, "one for each address, and one for both")
        self.assertIn("metadata: {name: t}\nspec: {service: {name: t, port: 80}}", text)
        self.assertIn("backends: [{name: t}]\n    strategy: RoundRobin\n", text)
        self.assertEqual(text.count("urgency: High"), 1)
        subject = penstock.Penstock(tempfile.mkdtemp(), 1, (2, 3, 4))
        self.addCleanup(shutil.rmtree, subject.folder)
        subject.write_config([plain, together])
        self.assertEqual(subject.services, [f"--service=default/t:80={address}" for _, address in targets])
        self.assertFalse(Subject.knows(subject, together))
        self.assertTrue(Subject.knows(subject, plain))


if __name__ == "__main__":
    unittest.main()
