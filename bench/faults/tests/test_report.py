"""What a run says of itself: the last line, the exit code, and what counts as missed."""

import unittest

import report
from case import Case


def result(grade, reason="", **more):
    return {"grade": grade, "reason": reason, "notes": {}, "seconds": 0.0, **more}


def facts(pct=100.0):
    clean = {"penstock": {"sent": 1000, "pct": pct}, "envoy": {"sent": 1000, "pct": 100.0}}
    return report.Facts({"penstock": "1", "envoy": "2"}, clean, 1.0, {}, "penstock")


def results(**ours):
    return {name: {"penstock": mine, "envoy": result("none", "no LLM gateway")} for name, mine in ours.items()}


class Resumed(unittest.TestCase):
    def test_what_could_not_be_played_is_open(self):
        self.assertTrue(report.is_open(None))
        self.assertTrue(report.is_open(result("none", "the case broke: KeyError: 'x'")))
        self.assertFalse(report.is_open(result("none", "no names", unfit=True)))
        self.assertFalse(report.is_open(result("fail", "it hangs")))

    def test_both_runs_are_told_of_together(self):
        before = report.raw({}, facts(99.0))
        both = report.together(before, facts(100.0))
        self.assertEqual(both.clean["penstock"], {"sent": 2000, "pct": 99.5})
        self.assertEqual(both.seconds, 2.0)


class LastLine(unittest.TestCase):
    def test_all_passed(self):
        line, code = report.last_line(results(S01=result("pass"), S08=result("safe")), facts())
        self.assertEqual(code, 0)
        self.assertTrue(line.startswith("faults: pass=1 safe=1 fail=0 of=2 clean_pct=100.00"), line)

    def test_a_case_of_ours_that_could_not_run_is_missed_and_counted(self):
        for reason in ("port 53 of 127.53.0.53: denied", "the case broke: KeyError: 'x'"):
            line, code = report.last_line(results(R33=result("none", reason), S01=result("pass")), facts())
            self.assertEqual(code, 1, reason)
            self.assertIn(" of=2 ", line)

    def test_what_the_cases_own_table_says_is_no_miss(self):
        line, code = report.last_line(results(R33=result("none", "no names", unfit=True), S01=result("pass")), facts())
        self.assertEqual(code, 0)
        self.assertIn("pass=1 safe=0 fail=0 of=2 ", line)

    def test_grades_that_are_missed(self):
        found = results(
            S01=result("safe"), S08=result("partial"), S14=result("safe"), R02=result("fail"), R03=result("pass")
        )
        self.assertEqual(report.missed(found, "penstock"), ["S01", "S08", "R02"])

    def test_clean_traffic_counts_and_peers_do_not(self):
        self.assertEqual(report.last_line(results(S01=result("pass")), facts(99.8))[1], 1)
        line, code = report.last_line({"S01": {"penstock": result("pass"), "envoy": result("fail")}}, facts())
        self.assertEqual(code, 0)
        self.assertIn("envoy=0/1", line)
        self.assertIn("envoy=0/0", report.last_line(results(S01=result("pass")), facts())[0])


class Table(unittest.TestCase):
    def test_why_a_case_has_no_grade_is_told(self):
        cases = [Case("R33", "names", (), None)]
        text = report.markdown(cases, results(R33=result("none", "port 53: denied")), facts())
        self.assertIn("| R33 names | – | – |", text)
        self.assertIn("- R33 Penstock, –: port 53: denied", text)


if __name__ == "__main__":
    unittest.main()
