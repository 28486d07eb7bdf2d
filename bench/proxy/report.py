"""Samples in, text out: a table for each kind of figure, the targets, and the last line."""

import statistics
import textwrap

from measure import BURST_DELTAS, LIMIT_P99_MS, SIZES, STREAM_KIB, STREAMS

WIDTH = 118
# What each subject must have, or the run has failed.
FIGURES = ["us", "alone_p99", "most_rps", "half_p99", "delta_us", "first_p99", "load_growth"]
FIGURES += [f"{kind}_{size}_us" for kind in ("whole", "stream") for size in SIZES if (kind, size) != ("whole", "1")]
# What the last line names after ours, in its order, and whose figure it is: Envoy as it is run, with access log and
# statistics, is who we are compared with.
LAST_LINE = {
    "envoy": "envoy_on", "envoy_bare": "envoy", "nginx": "nginx", "vllm_router": "vllm_router",
    "sglang_router": "sglang_router", "litellm": "litellm", "portkey": "portkey", "all_on": "all_on",
}  # fmt: skip


def number(value, digits=None):
    """At most one decimal unless told otherwise; `void` for what has no valid window."""
    if value is None:
        return "void"
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1
    return f"{value:.{digits}f}"


def held_figures(subject):
    if subject.heavy:
        return []
    return ["stream_kib", "held_growth", *(STREAM_KIB[transport] for transport in subject.transports)]


class Report:
    def __init__(self, bench, subjects, versions):
        self.bench, self.subjects, self.versions = bench, subjects, versions
        self.names = [subject.name for subject in subjects]
        self.targets = self._targets()
        missed = [target["what"] for target in self.targets if not target["met"]]
        # A stretch is a wish.
        self.failed = [what for what in missed if "(stretch)" not in what]
        self.missing = [
            f"{subject.name} ({figure})"
            for subject in subjects
            for figure in FIGURES + held_figures(subject)
            if self.median(subject.name, figure) is None
        ]

    def samples(self, name, figure):
        return self.bench.samples[name][figure]

    def median(self, name, figure):
        values = self.samples(name, figure)
        return statistics.median(values) if values else None

    def added(self, name, figure):
        through, direct = self.median(name, figure), self.median("direct", figure)
        return None if through is None or direct is None else through - direct

    def table(self, title, columns, rows, note=""):
        cells = [row for _, row in rows]
        widths = [
            max(len(text) for text in (columns[at], "0" * 8, *(row[at] for row in cells if at < len(row)))) + 2
            for at in range(len(columns))
        ]
        lines = ["", title, " " * 15 + "".join(f"{column:>{width}}" for column, width in zip(columns, widths))]
        for name, cells in rows:
            lines.append(f"{name:<15}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
        return lines + textwrap.wrap(note, WIDTH)

    def tables(self):
        lines = ["Medians over repetitions."]
        for subject in self.subjects:
            text = f"{subject.name} {self.versions[subject.name]}".strip()
            text = f"  {text:<22} {subject.what}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 25)
        lines += self._cpu() + self._latency() + self._maximum() + self._sizes() + self._streams() + self._memory()
        lines += ["", "Targets"]
        for target in self.targets:
            measured = number(target["measured"], 2)
            result = {True: "met", False: "missed", None: "void"}[target["met"]]
            lines.append(f"target {target['what']:<58} wanted {target['wanted']:<8} measured {measured:<8} {result}")
        missed = [target["what"] for target in self.targets if not target["met"]]
        met = len(self.targets) - len(missed)
        text = f"proof: targets met={met} of={len(self.targets)}"
        lines.append(f"{text}, missed: {'; '.join(missed)}" if missed else text)
        others = self.bench.others
        share = f"{statistics.median(others):.0%} of the time (median of windows; most {max(others):.0%})"
        lines += ["", f"Other processes ran on the subject's core for {share}: quiet is below 3%."]
        voids, of = len(self.bench.voids), self.bench.windows
        lines += [f"{of} windows, {voids} void" + (":" if voids else "")]
        lines += [f"  {void['subject']}: {void['window']}: {void['reason']}" for void in self.bench.voids]
        return lines

    def _cpu(self):
        rows = [("direct", ["", "", number(self.median("direct", "rps"), 0), "", "",
                            number(self.median("direct", "p50")), number(self.median("direct", "p99"))])]  # fmt: skip
        for name in self.names:
            us, values, busy = self.median(name, "us"), self.samples(name, "us"), self.median(name, "busy")
            spread = f"{number(min(values))}-{number(max(values))}" if values else "void"
            per_core = number(1e6 / us, 0) if us else "void"
            rows.append((name, [
                number(us), spread, number(self.median(name, "rps"), 0), per_core,
                "void" if busy is None else f"{busy:.0%}", number(self.median(name, "p50")),
                number(self.median(name, "p99")),
            ]))  # fmt: skip
        columns = ["µs/request", "from-to", "answers/s", "per CPU-second", "busy", "p50 µs", "p99 µs"]
        note = "direct: callers straight to the mock, both on one core: the rig's floor"
        floor, ours = self.median("direct", "rps"), self.median("penstock", "rps")
        note += f", {floor / ours:.1f} times penstock's throughput" if floor and ours else ""
        note += ". relay: what any proxy costs at least. busy: share of the time that the subject's core works."
        return self.table("CPU per request: 1 KB, 64 connections", columns, rows, note)

    def _latency(self):
        rows = [("direct", [number(self.median("direct", "alone_p50")), number(self.median("direct", "alone_p99"))])]
        for name in self.names:
            rows.append((name, [
                number(self.added(name, "alone_p50")), number(self.added(name, "alone_p99")),
                number(self.median(name, "half_rate"), 0), number(self.median(name, "half_p50")),
                number(self.median(name, "half_p99")), number(self.median(name, "alone_us")),
            ]))  # fmt: skip
        columns = ["p50, c=1", "p99, c=1", "half of max./s", "p50 there", "p99 there", "CPU, c=1"]
        note = "direct: as it is; all others: what they add. At half of the maximum (of 1 KB calls at a bearable p99, "
        note += "else of all) calls come at a rate, whether or not others are answered. CPU: µs per request, "
        note += "most of it for waking up."
        return self.table("Added latency, µs", columns, rows, note)

    def _maximum(self):
        rows = []
        for name in ["direct", *self.names]:
            best, most, busy = (self.median(name, figure) for figure in ("max_rps", "most_rps", "max_busy"))
            cells = ["none" if best == 0 else number(best, 0), number(most, 0)]
            rows.append((name, cells if busy is None else [*cells, f"{busy:.0%}"]))
        columns = [f"at p99 ≤ {LIMIT_P99_MS} ms", "at any p99", "busy there"]
        note = "busy there: how much of its core the subject used at the first; well below 100%, callers and mock or "
        note += "waiting were the bound."
        return self.table("Most answers a second: 1 KB", columns, rows, note)

    def _sizes(self):
        rows = [
            (name, [number(self.median(name, "us"))]
             + [number(self.median(name, f"whole_{size}_us")) for size in ("32", "256")]
             + [number(self.median(name, f"stream_{size}_us")) for size in SIZES])
            for name in self.names
        ]  # fmt: skip
        columns = ["1 KB", "32 KB", "256 KB", "stream, 1 KB", "stream, 32 KB", "stream, 256 KB"]
        note = f"A stream has {BURST_DELTAS} deltas, written one by one without a pause."
        return self.table("CPU per answer by size of the request, µs", columns, rows, note)

    def _streams(self):
        direct = [number(self.median("direct", figure)) for figure in ("first_p50", "first_p99")]
        rows = [("direct", ["", *direct])]
        for subject in self.subjects:
            name, held = subject.name, held_figures(subject)
            rows.append((name, [
                number(self.median(name, "delta_us")), number(self.added(name, "first_p50")),
                number(self.added(name, "first_p99")),
                *(number(self.median(name, figure)) if figure in held else "" for figure in STREAM_KIB.values()),
            ]))  # fmt: skip
        columns = ["µs/delta", "first token p50", "first token p99", "KiB/stream", "KiB/stream TLS", "KiB/stream h2"]
        note = "µs/delta: CPU of paced streams less that of their requests: 400 streams (10 for litellm and portkey) "
        note += "with a delta each 20 ms. First token: direct as it is, all others what they add, µs, for one caller "
        note += f"that writes head and body apart. KiB/stream: growth of resident memory while {STREAMS} paced streams "
        note += "are open; over HTTP/1.1, with TLS or without, each has a connection of its own, over HTTP/2 (in the "
        note += "clear) 100 share one. All other figures are of HTTP/1.1 without TLS."
        return self.table("Streams", columns, rows, note)

    def _memory(self):
        rows = []
        for subject in self.subjects:
            def mib(figure, name=subject.name):
                kib = self.median(name, figure)
                return "void" if kib is None else f"{kib / 1024:.1f}"

            cells = [mib("idle_kib"), mib("load_kib"), number(self.median(subject.name, "load_growth"), 2)]
            if not subject.heavy:
                cells += [mib("held_kib"), number(self.median(subject.name, "held_growth"), 2)]
            rows.append((subject.name, cells))
        columns = ["idle", "most under load", "after × idle", f"{STREAMS} streams", "after × idle"]
        return self.table("Resident memory, MiB", columns, rows, "After: 4 s after the last call.")

    def _targets(self):
        targets = []

        def target(what, measured, wanted, most=True):
            met = None if measured is None else measured <= wanted if most else measured >= wanted
            sign = "≤" if most else "≥"
            targets.append({"what": what, "wanted": f"{sign} {wanted:g}", "measured": measured, "met": met})

        def ratio(one, other):
            return None if one is None or not other else one / other

        def cpu(one, other):
            return ratio(self.median(one, "us"), self.median(other, "us"))

        here = set(self.names)
        for what, one, other, wanted in (
            ("CPU per request / Envoy's with log and statistics", "penstock", "envoy_on", 0.7),
            ("CPU per request / Envoy's without either", "penstock", "envoy", 0.7),
            ("CPU per request, all on / Envoy's with log and statistics", "all_on", "envoy_on", 1.0),
            ("CPU per request, all on / Envoy's without either", "all_on", "envoy", 1.0),
            ("CPU per request, all on / nginx's (stretch)", "all_on", "nginx", 1.5),
        ):
            if {one, other} <= here:
                target(what, cpu(one, other), wanted)
        for other, wanted in (("vllm_router", 2), ("litellm", 100)):
            if {"penstock", other} <= here:
                target(f"throughput per CPU-second / {other}'s", cpu(other, "penstock"), wanted, most=False)
        if {"penstock", "nginx"} <= here:
            added = ratio(self.added("penstock", "alone_p99"), self.added("nginx", "alone_p99"))
            target("added p99 at c=1 / nginx's", added, 1.3)
            delta = ratio(self.median("penstock", "delta_us"), self.median("nginx", "delta_us"))
            target("CPU per streamed delta / nginx's", delta, 1.2)
        if "penstock" in here:
            kib = self.median("penstock", "stream_kib")
            if "vllm_router" in here:
                target("KiB a stream / vllm_router's", ratio(kib, self.median("vllm_router", "stream_kib")), 1.0)
            target("KiB a stream", kib, 32)
            target("KiB a stream (stretch)", kib, 20)
            target("memory after load / idle", self.median("penstock", "load_growth"), 2)
            target(f"memory after {STREAMS} streams / idle", self.median("penstock", "held_growth"), 2)
        return targets

    def summary(self, whole):
        """The last line; of another name, with what there is, if the run was not a whole one."""
        figures = [("us_per_request", self.median("penstock", "us"))]
        figures += [(shown, self.median(name, "us")) for shown, name in LAST_LINE.items()]
        figures += [
            ("added_p99_us", self.added("penstock", "alone_p99")),
            ("us_per_delta", self.median("penstock", "delta_us")),
            ("kib_per_stream", self.median("penstock", "stream_kib")),
        ]
        text = " ".join(f"{name}={number(value)}" for name, value in figures if value is not None)
        return f"bench-proxy: {text}" if whole else f"bench-proxy in part: {text}"
