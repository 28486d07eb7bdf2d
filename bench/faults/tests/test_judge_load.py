"""The judge of load cases on made-up observations."""

import unittest

import judge_load
from tests.test_judge import answer, cut, record


def at(t, **more):
    return answer(**{"t_start": t, "t_first": t + 0.1, "t_end": t + 0.2, **more})


def waited(t):
    return at(t, t_first=t + 3.0, t_end=t + 3.2)


def refused(t, took_s=0.005, status=503):
    return at(t, t_end=t + took_s, status=status, error={"code": "overloaded"})


class Pools(unittest.TestCase):
    def test_a_frozen_one_is_left_and_comes_back(self):
        before = [at(number) for number in range(5)]
        back = [record("beta", 31.0)]

        def grade(during, log=back):
            return judge_load.frozen(before, during, before, log, 10.0, 30.0).grade

        self.assertEqual(grade([waited(10.5), at(12.0)]), "pass")
        self.assertEqual(grade([waited(10.0 + n / 2) for n in range(5)]), "pass", "five may wait")
        self.assertEqual(grade([waited(10.0 + n) for n in range(9)]), "partial")
        self.assertEqual(grade([at(12.0, status=502)]), "safe")
        self.assertEqual(grade([cut(4, t_start=12.0)]), "fail")
        self.assertEqual(grade([at(12.0)], []), "partial")
        self.assertEqual(grade([at(12.0)], [record("beta", 50.0)]), "partial")

    def test_once_a_frozen_one_is_left_the_others_answer_as_before(self):
        before, back = [at(float(number)) for number in range(5)], [record("beta", 31.0)]

        def grade(*slow):
            during = [at(10.0 + n / 10) for n in range(200)] + list(slow)
            return judge_load.frozen(before, during, before, back, 10.0, 30.0).grade

        later = [at(20.0, t_first=20.25, t_end=20.3)] * 3
        self.assertEqual(grade(), "pass")
        self.assertEqual(grade(*later), "partial", "250 ms, where 100 were before")
        self.assertEqual(grade(*[at(20.0, t_first=20.18, t_end=20.3)] * 3), "pass")
        self.assertEqual(grade(later[0]), "pass", "one in a hundred")
        self.assertEqual(grade(*[waited(11.0 + n / 2) for n in range(4)]), "pass", "within the first three seconds")

    def test_a_slow_one_keeps_a_twentieth(self):
        fast = [record("alpha", 11.0 + n / 100) for n in range(96)]
        self.assertEqual(judge_load.gray([answer()], [*fast, record("beta", 12.0)], 0.0, 25.0).grade, "pass")
        self.assertEqual(judge_load.gray([answer()], fast[:10] + [record("beta", 12.0)], 0.0, 25.0).grade, "partial")
        early = [record("beta", 5.0)] * 50
        self.assertEqual(judge_load.gray([answer()], fast + early, 0.0, 25.0).grade, "pass")


class Down(unittest.TestCase):
    def test_repeats_are_bounded(self):
        answers = [refused(n / 10) for n in range(100)]
        log = [record("alpha", n / 10) for n in range(100)]
        grade = lambda log: judge_load.all_down(answers, log, 0.0, 20.0, (503,)).grade  # noqa: E731
        self.assertEqual(grade(log), "pass")
        self.assertEqual(grade(log + log[:21]), "partial")
        self.assertEqual(grade(log + log[:20]), "pass")
        hung = [*answers, at(5.0, end="timeout", status=None)]
        self.assertEqual(judge_load.all_down(hung, log, 0.0, 20.0, (503,)).grade, "fail")

    def test_callers_are_told_when_to_come_back(self):
        grade = lambda **more: judge_load.says_when_to_come_back([answer(**more)]).grade  # noqa: E731
        self.assertEqual(grade(status=503, headers={"retry-after": "1"}), "pass")
        self.assertEqual(grade(status=503), "partial")
        self.assertEqual(grade(status=502, headers={"retry-after": "1"}), "partial")

    def test_all_are_left_alone_until_their_retry_after(self):
        few = [record("alpha", float(n)) for n in range(9)]
        self.assertEqual(judge_load.retry_after_of_all(few, 3.0, 0.0, 9.0).grade, "pass")
        many = [record("alpha", n / 10) for n in range(90)]
        self.assertEqual(judge_load.retry_after_of_all(many, 3.0, 0.0, 9.0).grade, "partial")

    def test_recovery_and_herd(self):
        self.assertEqual(judge_load.recovers([at(12.0), at(16.0)], 10.0).grade, "pass")
        self.assertEqual(judge_load.recovers([refused(12.0), at(16.0)], 10.0).grade, "pass")
        self.assertEqual(judge_load.recovers([refused(16.0)], 10.0).grade, "partial")
        self.assertEqual(judge_load.recovers([at(12.0)], 10.0).grade, "fail")
        self.assertEqual(judge_load.no_herd([record("alpha", 1.0)] * 15, 0.0, 5.0, 10).grade, "pass")
        self.assertEqual(judge_load.no_herd([record("alpha", 1.0)] * 40, 0.0, 5.0, 10).grade, "partial")


class Crowds(unittest.TestCase):
    def test_overload(self):
        good = [at(n / 100) for n in range(100)]
        grade = lambda answers: judge_load.overload(answers, 1.0, 100.0, 2.0).grade  # noqa: E731
        self.assertEqual(grade(good + [refused(1.0)] * 200), "pass")
        self.assertEqual(grade(good + [refused(1.0, 0.5)] * 200), "partial")
        self.assertEqual(grade(good[:60] + [refused(1.0)] * 200), "partial")
        late = [at(1.0, t_end=3.5) for _ in range(300)]
        self.assertEqual(grade(late), "fail")

    def test_refusals_are_told_with_their_times(self):
        answers = [at(n / 100) for n in range(100)] + [refused(1.0)] * 98 + [refused(1.0, 0.4)] * 2
        verdict = judge_load.overload(answers, 1.0, 100.0, 2.0)
        self.assertEqual(verdict.grade, "pass")
        self.assertIn("half within 5 ms, 99% within 400 ms", verdict.reason)

    def test_the_urgent_are_served(self):
        grade = lambda answers: judge_load.urgent(answers, 2.0).grade  # noqa: E731
        good = [at(1.0)] * 99
        self.assertEqual(grade([*good, refused(1.0)]), "pass")
        self.assertEqual(grade([*good, refused(1.0), refused(1.0)]), "partial")
        self.assertEqual(grade([*good, at(1.0, t_end=3.5), at(1.0, t_end=3.5)]), "partial", "too late is not served")
        self.assertEqual(grade([]), "fail")

    def test_poison(self):
        others = [answer()] * 200
        self.assertEqual(judge_load.poison([2, 0, 0], others).grade, "pass")
        self.assertEqual(judge_load.poison([2, 2, 2], others).grade, "partial")
        self.assertEqual(judge_load.poison([3, 0, 0], others).grade, "fail")
        self.assertEqual(judge_load.poison([1, 0, 0], others[:80] + [answer(status=502)] * 20).grade, "fail")

    def test_departures(self):
        soon = [(1.0, 1.01)] * 999
        self.assertEqual(judge_load.departures([*soon, (1.0, 1.5)]).grade, "pass")
        self.assertEqual(judge_load.departures([*soon[:900], *[(1.0, 1.5)] * 100]).grade, "partial")
        self.assertEqual(judge_load.departures([*soon[:900], *[(1.0, None)] * 100]).grade, "fail")

    def test_drain(self):
        streams = [answer()] * 5
        self.assertEqual(judge_load.drain(streams, 10.5, 10.0, True).grade, "pass")
        self.assertEqual(judge_load.drain(streams, 14.0, 10.0, True).grade, "partial")
        self.assertEqual(judge_load.drain(streams, None, 10.0, True).grade, "partial")
        self.assertEqual(judge_load.drain(streams, 10.5, 10.0, False).grade, "partial")
        self.assertEqual(judge_load.drain([*streams, cut(3, error="x")], 10.5, 10.0, True).grade, "safe")
        self.assertEqual(judge_load.drain([*streams, cut(3)], 10.5, 10.0, True).grade, "fail")

    def test_slow_callers(self):
        others = [answer()] * 100
        self.assertEqual(judge_load.slow_heads([10.5] * 10, 10.0, others).grade, "pass")
        self.assertEqual(judge_load.slow_heads([20.0] * 10, 10.0, others).grade, "partial")
        self.assertEqual(judge_load.slow_heads([10.5, None], 10.0, others).grade, "partial")
        self.assertEqual(judge_load.slow_heads([10.5], 10.0, others[:90] + [answer(status=503)] * 10).grade, "fail")
        self.assertEqual(judge_load.slow_readers(200, 200 * 100, 0, 200, 75).grade, "pass")
        self.assertEqual(judge_load.slow_readers(200, 200 * 300, 0, 200, 75).grade, "partial")
        self.assertEqual(judge_load.slow_readers(200, 200 * 9000, 0, 200, 75).grade, "fail")
        self.assertEqual(judge_load.slow_readers(200, 0, 3, 200, 75).grade, "partial")
        self.assertEqual(judge_load.slow_readers(200, 0, 0, 10, 75).grade, "partial")

    def test_memory(self):
        self.assertEqual(judge_load.bounded(10, 100).grade, "pass")
        self.assertEqual(judge_load.bounded(200, 100).grade, "partial")
        self.assertEqual(judge_load.bounded(1000, 100).grade, "fail")

    def test_a_killed_replica_loses_what_it_held_and_nothing_else(self):
        well = [[(number % 2, at(float(number)))] for number in range(30)]
        held = [(1, at(9.9, end="reset", status=None)), (1, cut(4, t_start=9.8, t_end=10.0, end="cut"))]
        gone = (1, at(10.5, end="unreachable", status=None))
        lost = [*well, *([one] for one in held)]

        def grade(calls, back_s=0.5):
            return judge_load.killed(calls, 1, 10.0, 10.1, back_s, 13.0).grade

        self.assertEqual(grade(lost), "pass")
        self.assertEqual(grade([*lost, [gone, (0, at(10.6))]]), "pass", "sent again")
        self.assertEqual(grade([*lost, [gone, (0, gone[1])]]), "fail", "reached nobody")
        self.assertEqual(grade([*lost, [(1, cut(4, t_start=9.8, t_end=10.0))]]), "fail", "looks like an end")
        self.assertEqual(grade([*lost, [(1, at(9.9, t_end=25.0, end="timeout", status=None))]]), "fail", "hangs")
        self.assertEqual(grade([*lost, [(0, at(9.9, end="reset", status=None))]]), "fail", "at the other replica")
        self.assertEqual(grade([*lost, [(1, at(14.0, status=503, error={"code": "x"}))]]), "fail", "later")
        self.assertEqual(grade([one for one in lost if one[0][1].t_start < 12.0]), "fail", "nothing afterwards")
        self.assertEqual(grade([one for one in well if one[0][0] == 0 or one[0][1].t_start > 11.0]), "fail", "no dose")
        self.assertEqual(grade(lost, 2.5), "partial")
        self.assertEqual(grade(lost, None), "partial")

    def test_streams_that_say_little(self):
        streams = [answer()] * 100
        self.assertEqual(judge_load.held_streams(streams, 100 * 40, 0.1, 48, 0.5).grade, "pass")
        self.assertEqual(judge_load.held_streams(streams, 100 * 50, 0.1, 48, 0.5).grade, "partial")
        self.assertEqual(judge_load.held_streams(streams, 100 * 40, 0.6, 48, 0.5).grade, "partial")
        self.assertEqual(judge_load.held_streams([*streams, cut(5, end="cut")], 100, 0.1, 48, 0.5).grade, "fail")


if __name__ == "__main__":
    unittest.main()
