"""The judge on made-up rounds."""

import random
import unittest

import judge


def rounds(factor, noise, seed, count=6):
    """A default that is `factor` times another strategy, and a third one; the load differs by round."""
    rng = random.Random(seed)
    loads = [rng.uniform(50, 150) for _ in range(count)]

    def of(times):
        return [load * times * rng.lognormvariate(0, noise) for load in loads]

    return {"other": of(1.0), "third": of(2.0), "default": of(factor)}


def worse(results, more_is_better=False, comparisons=6):
    compared = judge.compare("pool", "TTFT", results, "default", comparisons)
    return {item.other for item in compared if item.is_worse(more_is_better)}


class Judge(unittest.TestCase):
    def test_what_is_clearly_slower_is_worse_and_what_is_quicker_is_not(self):
        self.assertEqual(worse(rounds(1.2, 0.02, 1)), {"other"})
        self.assertEqual(worse(rounds(0.8, 0.02, 1)), set())

    def test_of_throughput_less_is_worse(self):
        self.assertEqual(worse(rounds(1.2, 0.02, 1), more_is_better=True), {"third"})

    def test_loads_that_differ_by_round_are_no_noise(self):
        compared = judge.compare("pool", "TTFT", rounds(1.2, 0.001, 2), "default", 6)
        self.assertTrue(all(item.high / item.low < 1.02 for item in compared))

    def test_equals_are_called_worse_in_few_runs(self):
        wrong = sum(bool(worse(rounds(1.0, 0.1, seed), comparisons=2)) for seed in range(1000))
        # One in twenty may be wrong, one in forty on this side.
        self.assertLess(wrong, 50)

    def test_a_difference_that_noise_explains_is_not_called_worse(self):
        self.assertEqual(worse(rounds(1.05, 0.2, 3)), set())

    def test_intervals_hold_the_true_ratio(self):
        held = 0
        for seed in range(500):
            found = judge.compare("pool", "TTFT", rounds(1.3, 0.1, seed), "default", 1)
            held += sum(item.low <= 1.3 <= item.high for item in found if item.other == "other")
        self.assertGreater(held, 450)

    def test_one_round_says_nothing_of_noise(self):
        with self.assertRaises(ValueError):
            worse(rounds(1.0, 0.1, 1, count=1))

    def test_quantiles_are_those_of_tables(self):
        for probability, freedom, wanted in ((0.975, 10, 2.228), (0.995, 20, 2.845), (0.9995, 8, 5.041)):
            self.assertAlmostEqual(judge.student_t(probability, freedom) / wanted, 1.0, delta=0.01)


if __name__ == "__main__":
    unittest.main()
