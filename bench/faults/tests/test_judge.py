"""The judge on made-up observations: every grade of every rule."""

import re
import unittest

import judge
from client import WORDS, Answer, text_of


def answer(**more):
    """A whole streamed answer, changed as told."""
    fields = {
        "id": "q1", "stream": True, "t_start": 100.0, "t_head": 100.1, "t_first": 100.2, "t_end": 101.0,
        "status": 200, "text": text_of(WORDS), "pieces": WORDS, "finish": "stop", "done": True, "model": "beta-model",
        "usage": {"completion_tokens": WORDS}, **more,
    }  # fmt: skip
    return Answer(**fields)


def cut(at, **more):
    return answer(text=text_of(at), pieces=at, finish=None, done=False, usage=None, **more)


def record(upstream, t, request_id="q1", **more):
    return {"upstream": upstream, "id": request_id, "t": t, "end": "done", "tokens": WORDS, "gone": None, **more}


class Kinds(unittest.TestCase):
    def test_each_end_has_its_kind(self):
        for expected, given in {
            "whole": answer(),
            "hang": answer(end="timeout", status=None),
            "dropped": answer(end="reset", status=None),
            "error": answer(status=503, error={"code": "x"}),
            "error_event": cut(40, error={"code": "stream_cut"}),
            "cut": cut(40, end="cut"),
            "truncated": cut(40),
            "wrong": answer(text="something else"),
            "unreadable": answer(stream=False, text="", garbled=1),
        }.items():
            self.assertEqual(judge.kind(given), expected)

    def test_all_words_without_a_finish_are_a_truncated_stream(self):
        self.assertEqual(judge.kind(answer(finish=None, done=False)), "truncated")
        self.assertEqual(judge.kind(answer(done=False)), "whole", "[DONE] alone is not what makes it whole")

    def test_repeated_words_are_wrong(self):
        self.assertEqual(judge.kind(answer(text=text_of(WORDS) + text_of(1))), "wrong")

    def test_ends_and_their_grades(self):
        for grade, given in (
            ("pass", answer()), ("safe", answer(status=502)), ("safe", cut(40, error="x")),
            ("safe", cut(40, end="cut")),
            ("fail", cut(40)), ("fail", cut(40, end="timeout")), ("fail", answer(text="other")),
            ("safe", answer(status=None, end="reset")),
        ):  # fmt: skip
            self.assertEqual(judge.end_of(given).grade, grade, given)

    def test_a_stall_beyond_the_limit_ends_in_time_with_an_error_event(self):
        for grade, given in (
            ("pass", cut(20, error="x", t_end=104.5)), ("safe", cut(20, error="x", t_end=109.0)),
            ("safe", cut(20, end="cut")), ("fail", cut(20)), ("fail", cut(20, end="timeout")), ("pass", answer()),
        ):  # fmt: skip
            self.assertEqual(judge.stalled(given, 6.0).grade, grade, given)

    def test_the_worst_probe_decides_and_its_reason_is_kept(self):
        verdict = judge.worst([judge.PASS, judge.Verdict("safe", "a"), judge.Verdict("partial", "b")])
        self.assertEqual(verdict, judge.Verdict("safe", "a"))
        self.assertEqual(judge.worst([]).grade, "fail")


class Failover(unittest.TestCase):
    def test_retry_after_is_honoured_or_not(self):
        early = [record("alpha", 0.0), record("alpha", 0.5)]
        late = [record("alpha", 0.0), record("alpha", 2.1)]
        elsewhere = [record("alpha", 0.0), record("beta", 0.1)]
        self.assertEqual(judge.retry_after_honoured(early, answer(), "alpha", 1.8).grade, "partial")
        self.assertEqual(judge.retry_after_honoured(late, answer(), "alpha", 1.8).grade, "pass")
        self.assertEqual(judge.retry_after_honoured(elsewhere, answer(), "alpha", 1.8).grade, "pass")

    def test_hammering_fails(self):
        self.assertEqual(
            judge.not_hammered([record("alpha", n / 10) for n in range(5)], answer(), "alpha").grade, "fail"
        )
        self.assertEqual(
            judge.not_hammered([record("alpha", n * 2.0) for n in range(7)], answer(), "alpha").grade, "fail"
        )
        self.assertEqual(
            judge.not_hammered([record("alpha", n * 2.0) for n in range(5)], answer(), "alpha").grade, "pass"
        )

    def test_a_silent_route_is_left_after_its_limit(self):
        log = [record("alpha", 100.0), record("beta", 102.0)]
        self.assertEqual(judge.silent_route(log, answer(t_end=103.0), 2.0).grade, "pass")
        self.assertEqual(judge.silent_route(log, answer(t_end=109.0), 2.0).grade, "partial")
        self.assertEqual(judge.silent_route([*log, record("alpha", 102.0)], answer(t_end=103.0), 2.0).grade, "partial")
        self.assertEqual(judge.silent_route(log, answer(status=504), 2.0).grade, "safe")

    def test_a_flapping_choice_is_used_again(self):
        served = [answer()] * 3
        self.assertEqual(judge.flapping(served, [record("alpha", 35.0)], 30.0, 30.0).grade, "pass")
        self.assertEqual(judge.flapping(served, [record("alpha", 65.0)], 30.0, 30.0).grade, "partial")
        self.assertEqual(judge.flapping(served, [record("beta", 35.0)], 30.0, 30.0).grade, "fail")
        self.assertEqual(judge.flapping([answer(status=503)], [record("alpha", 31.0)], 30.0, 30.0).grade, "safe")

    def test_the_model_that_answered_is_named_and_charged(self):
        self.assertEqual(judge.accounting(answer()).grade, "pass")
        self.assertEqual(judge.accounting(answer(model="alpha-model")).grade, "partial")
        self.assertEqual(judge.accounting(answer(usage=None)).grade, "partial")
        self.assertEqual(judge.accounting(answer(), {"default/alpha-1": 60.0}).grade, "fail")
        self.assertEqual(judge.accounting(answer(), {"default/alpha-1": 0.0, "default/beta-1": 60.0}).grade, "pass")


class Streams(unittest.TestCase):
    def test_a_cut_stream_wants_an_error_event(self):
        self.assertEqual(judge.cut_stream(cut(40, error="x")).grade, "pass")
        self.assertEqual(judge.cut_stream(answer()).grade, "pass")
        self.assertEqual(judge.cut_stream(cut(40, end="cut")).grade, "safe")
        self.assertEqual(judge.cut_stream(cut(40)).grade, "fail")
        self.assertEqual(judge.cut_stream(answer(error="x")).grade, "partial")
        aborted = answer(text=text_of(20), pieces=20, finish="abort")
        self.assertEqual(judge.cut_stream(aborted).grade, "partial")

    def test_an_unreadable_event_is_dropped_or_refused_but_not_passed_on(self):
        self.assertEqual(judge.malformed(answer()).grade, "pass")
        self.assertEqual(judge.malformed(answer(garbled=1)).grade, "partial")
        self.assertEqual(judge.malformed(answer(bad_utf8=1, text=text_of(WORDS) + "\ufffd")).grade, "partial")
        self.assertEqual(judge.malformed(cut(9, error="x")).grade, "safe")
        self.assertEqual(judge.malformed(cut(9, error="x"), is_damaged=True).grade, "pass")
        self.assertEqual(judge.malformed(cut(9, garbled=1)).grade, "fail")

    def test_a_missing_done_does_not_spoil_a_whole_answer(self):
        whole = answer(done=False)
        self.assertEqual(judge.no_done(whole, whole.t_end - 0.1).grade, "pass")
        self.assertEqual(judge.no_done(whole, whole.t_end - 5.0).grade, "partial")
        self.assertEqual(judge.no_done(answer(usage=None), 100.9).grade, "partial")
        self.assertEqual(judge.no_done(answer(error={"code": "stream_cut"}), 100.9).grade, "partial")

    def test_the_fallbacks_refusal_hides_nothing(self):
        self.assertEqual(judge.prefill(cut(40, error={"code": "prefill_rejected"})).grade, "fail")
        self.assertEqual(judge.prefill(cut(40, error={"code": "stream_cut"})).grade, "safe")


class Refusals(unittest.TestCase):
    def test_a_prompt_that_does_not_fit_goes_to_the_longer_model_once(self):
        log = [record("alpha", 0.0)]
        self.assertEqual(judge.context_length([*log, record("beta", 0.1)], answer()).grade, "pass")
        self.assertEqual(judge.context_length(log, answer(status=400)).grade, "safe")
        self.assertEqual(judge.context_length(log * 2, answer()).grade, "fail")

    def test_a_content_filter_is_reported_with_its_reason(self):
        log = [record("alpha", 0.0)]
        told = answer(status=400, body=b'{"error":{"code":"content_policy_violation"}}')
        self.assertEqual(judge.content_filter(log, told).grade, "pass")
        self.assertEqual(judge.content_filter(log, answer(status=400, body=b"{}")).grade, "safe")
        self.assertEqual(judge.content_filter(log, answer()).grade, "partial")
        self.assertEqual(judge.content_filter(log * 2, told).grade, "fail")


class Smuggling(unittest.TestCase):
    def test_bytes_that_two_readers_read_differently_are_refused(self):
        seen = [record("alpha", 0.0, "visible", head="POST / HTTP/1.1")]
        for grade, given in (
            ("pass", (400, "closed", [])), ("pass", (501, "closed", [])), ("safe", (None, "reset", [])),
            ("partial", (None, "timeout", [])), ("partial", (502, "closed", [])), ("safe", (200, "closed", seen)),
            ("fail", (400, "closed", seen * 2)), ("fail", (200, "closed", [record("alpha", 0.0, "hidden", head="")])),
            ("fail", (400, "closed", [record("alpha", 0.0, "unknown", head="")])),
        ):  # fmt: skip
            self.assertEqual(judge.smuggled(*given).grade, grade, given)

    def test_over_http2_an_end_is_a_refusal_and_the_next_request_counts(self):
        never = re.compile("^x-hidden:", re.I | re.M)
        clean, leaked = "POST / HTTP/1.1\r\nHost: a", "POST / HTTP/1.1\r\nX-Hidden: 1"

        def grade(status, how, head=None, following=None):
            seen = [] if head is None else [record("alpha", 0.0, "visible", head=head)]
            return judge.smuggled_h2(status, how, seen, never, following or answer()).grade

        self.assertEqual(grade(None, "reset"), "pass")
        self.assertEqual(grade(None, "closed"), "pass")
        self.assertEqual(grade(400, "answered"), "pass")
        self.assertEqual(grade(None, "timeout"), "partial")
        self.assertEqual(grade(502, "answered"), "partial")
        self.assertEqual(grade(200, "answered", clean), "safe")
        self.assertEqual(grade(200, "answered", leaked), "fail")
        self.assertEqual(grade(None, "reset", leaked), "fail", "refused, and passed on all the same")
        self.assertEqual(grade(None, "reset", following=answer(status=502)), "fail")


if __name__ == "__main__":
    unittest.main()
