"""Grades of the cases that need load: fleets of requests rather than one. Pure."""

from judge import PASS, Verdict, end_of, kind, percentile, share_lost, worst


def _lost(answers):
    """Silent losses and hangs fail; clear errors are safe."""
    ends = [end_of(answer) for answer in answers]
    bad = [verdict for verdict in ends if verdict.grade != "pass"]
    if not bad:
        return PASS
    found = worst(bad)
    return Verdict(found.grade, f"{len(bad)} of {len(answers)}: {found.reason}")


def first_p99_s(answers):
    """To the first token, or to the end of what had none."""
    return percentile([answer.ttft_s or answer.wall_s for answer in answers], 0.99)


# From then on the frozen one is out of rotation, and the others answer as before: at most twice the p99 that was, or
# what two cores with the callers and the upstreams on them make of any p99 now and then.
LEFT_WITHIN_S, NOISE_S = 3.0, 0.2


def frozen(before, during, after, log, frozen_at, thawed_at):
    """One of three upstreams is stopped: nobody waits for it for long, nobody loses an answer, and it comes back."""
    base = first_p99_s(before)
    # Below the first-byte limit, however slow the machine: whoever waited for the frozen one counts.
    slow_s = min(max(1.0, 3 * base), 2.5)
    slow = [answer for answer in during if kind(answer) != "whole" or answer.ttft_s > slow_s]
    verdicts = [_lost(during), _lost(after)]
    if slow and len(slow) > 5:
        last = max(answer.t_start for answer in slow) - frozen_at
        if last > LEFT_WITHIN_S:
            verdicts.append(
                Verdict("partial", f"{len(slow)} requests waited, the last one sent {last:.1f} s after the freeze")
            )
    later = first_p99_s([answer for answer in during if answer.t_start >= frozen_at + LEFT_WITHIN_S])
    if later > max(2 * base, NOISE_S):
        shown = f"p99 {later * 1000:.0f} ms from {LEFT_WITHIN_S:g} s after the freeze on, {base * 1000:.0f} ms before"
        verdicts.append(Verdict("partial", shown))
    back = [record["t"] - thawed_at for record in log if record["upstream"] == "beta" and record["t"] > thawed_at + 0.5]
    if not back:
        verdicts.append(Verdict("partial", "not used again after it went on"))
    elif back[0] > 15.0:
        verdicts.append(Verdict("partial", f"used again only {back[0]:.1f} s after it went on"))
    return worst(verdicts)


def gray(answers, log, slowed_at, until):
    """One of three is ten times slower: within 10 s it gets at most 5 % of the requests, and stays there."""
    late = [record for record in log if slowed_at + 10.0 <= record["t"] < until]
    verdicts = [_lost(answers)]
    if not late:
        return worst([*verdicts, Verdict("fail", "nothing was sent upstream")])
    share = sum(record["upstream"] == "beta" for record in late) / len(late)
    if share > 0.05:
        verdicts.append(Verdict("partial", f"the slow one still gets {share:.0%}"))
    return worst(verdicts)


def all_down(answers, log, started, ended, statuses):
    """Everything answers 503 or 429. A retry budget bounds what is sent upstream; callers hear at once."""
    in_window = sum(started <= record["t"] < ended for record in log)
    verdicts = []
    if in_window > 1.2 * len(answers):
        verdicts.append(Verdict("partial", f"{in_window / len(answers):.2f} attempts a request (limit 1.2)"))
    for answer in answers:
        seen = kind(answer)
        if seen == "error" and answer.status in statuses:
            continue
        verdicts.append(end_of(answer) if seen != "whole" else Verdict("fail", "an answer out of nowhere"))
    slow = percentile([answer.wall_s for answer in answers], 0.99)
    if slow > 5.0:
        verdicts.append(Verdict("partial", f"callers wait {slow:.1f} s for the error"))
    # A clear error is the expected end of each of these requests.
    verdicts = [Verdict("partial", v.reason) if v.grade == "safe" else v for v in verdicts]
    return worst(verdicts or [PASS])


def says_when_to_come_back(answers):
    """Nobody is there: 503 with Retry-After."""
    failed = [answer for answer in answers if answer.status and kind(answer) != "whole"]
    silent = [answer for answer in failed if answer.status != 503 or "retry-after" not in answer.headers]
    if silent:
        return Verdict("partial", f"{len(silent)} of {len(failed)} errors are no 503 with Retry-After")
    return PASS


def retry_after_of_all(log, wait_s, started, ended, upstreams=("alpha", "beta")):
    """Each upstream asked to be left alone for `wait_s`; how often were they asked per period?"""
    verdicts = []
    periods = max(1.0, (ended - started) / wait_s)
    for name in upstreams:
        asked = sum(record["upstream"] == name and started <= record["t"] < ended for record in log)
        # Requests that were under way when the first refusal came are no breach: some per period.
        if asked > 4 * periods:
            verdicts.append(
                Verdict("partial", f"{name} was asked {asked} times in {periods:.0f} periods of its Retry-After")
            )
    return worst(verdicts or [PASS])


def recovers(answers, well_at, within_s=5.0):
    """From `within_s` after the end of the fault on, everybody is answered."""
    late = [answer for answer in answers if answer.t_start >= well_at + within_s]
    lost = [answer for answer in late if kind(answer) != "whole"]
    if not late:
        return Verdict("fail", "no request after the fault")
    if lost:
        return Verdict("partial", f"{len(lost)} of {len(late)} fail still {within_s:g} s after the fault")
    return PASS


def no_herd(log, started, ended, offered_rps):
    """No second after the fault sees more than 1.5 times what is offered."""
    seconds = {}
    for record in log:
        if started <= record["t"] < ended:
            seconds[int(record["t"] - started)] = seconds.get(int(record["t"] - started), 0) + 1
    peak = max(seconds.values(), default=0)
    if peak > 1.5 * offered_rps + 3:
        return Verdict("partial", f"{peak} requests in one second after the fault ({offered_rps:g} offered)")
    return PASS


def urgent(answers, deadline_s, least=0.99):
    """Those that go before others are served while others are refused."""
    good = sum(kind(answer) == "whole" and answer.wall_s <= deadline_s for answer in answers)
    if not answers:
        return Verdict("fail", "no request of high urgency")
    if good < least * len(answers):
        return Verdict("partial", f"{good} of {len(answers)} of high urgency served in time ({least:.0%} wanted)")
    return PASS


def overload(answers, seconds, peak_rps, deadline_s):
    """Three times what the upstreams can: as much as they can is answered in time, the rest is refused at once."""
    good = [answer for answer in answers if kind(answer) == "whole" and answer.wall_s <= deadline_s]
    refused = [answer for answer in answers if kind(answer) == "error" and answer.status in (429, 503)]
    goodput = len(good) / seconds
    quick, late = (percentile([answer.wall_s for answer in refused], share) * 1000 for share in (0.5, 0.99))
    shown = f"goodput {goodput:.0f}/s of {peak_rps:.0f}/s, {len(refused)} of {len(answers)} refused"
    if refused:
        shown += f" (half within {quick:.0f} ms, 99% within {late:.0f} ms)"
    others = len(answers) - len(good) - len(refused)
    if goodput >= 0.9 * peak_rps:
        if refused and quick > 20:
            return Verdict("partial", f"{shown}: too late")
        return Verdict("pass", shown)
    if goodput >= 0.5 * peak_rps:
        return Verdict("partial", f"{shown}, {others} too late or cut")
    return Verdict("fail", f"{shown}, {others} too late or cut")


def poison(crashes_per_send, others):
    """A request that ends the process that reads it, sent again and again."""
    lost = share_lost(others)
    total = sum(crashes_per_send)
    shown = f"crashes per send {crashes_per_send}, others lost {lost:.1%}"
    if max(crashes_per_send, default=0) > 2 or lost > 0.05:
        return Verdict("fail", shown)
    if total > 2 or lost > 0.01:
        return Verdict("partial", shown)
    return Verdict("pass", shown)


def departures(pairs, limit_s=0.1):
    """`pairs`: (when the caller left, when the upstream saw it, or None)."""
    missing = sum(gone is None for _, gone in pairs)
    late = [gone - left for left, gone in pairs if gone is not None and gone - left > limit_s]
    if not pairs:
        return Verdict("fail", "no departure was seen")
    if missing > 0.001 * len(pairs):
        return Verdict("fail", f"{missing} of {len(pairs)} went on upstream after the caller had left")
    if len(late) > 0.001 * len(pairs):
        middle = percentile([gone - left for left, gone in pairs if gone is not None], 0.5)
        shown = f"{len(late)} of {len(pairs)} aborted later than {limit_s * 1000:.0f} ms"
        return Verdict("partial", f"{shown} (half: {middle * 1000:.0f} ms)")
    return PASS


def drain(answers, ended_at, last_end, keep_alive_closed):
    """Told to end with streams open: all of them are carried to their ends, then the process ends."""
    lost = [answer for answer in answers if not is_counted_whole(answer)]
    if lost:
        silent = [answer for answer in lost if kind(answer) in ("truncated", "hang", "wrong")]
        grade = "fail" if silent else "safe"
        return Verdict(grade, f"{len(lost)} of {len(answers)} streams were cut, {len(silent)} of them silently")
    if ended_at is None:
        return Verdict("partial", "the process did not end after its last stream")
    if ended_at - last_end > 1.5:
        return Verdict("partial", f"the process ended {ended_at - last_end:.1f} s after its last stream")
    if not keep_alive_closed:
        return Verdict("partial", "an idle connection was left open")
    return PASS


def is_counted_whole(answer):
    """Whole, where the length is the upstream's choice: every word from the first on, a finish, and the same count in
    its usage."""
    from client import text_of

    counted = (answer.usage or {}).get("completion_tokens", answer.pieces)
    return (
        answer.end == "complete" and answer.error is None and answer.finish == "stop"
        and answer.text == text_of(answer.pieces) and counted == answer.pieces
    )  # fmt: skip


def slow_heads(closed_after_s, wanted_s, others):
    """`closed_after_s`: for each slow caller, when the subject closed it, or None."""
    lost = share_lost(others)
    if lost > 0.01:
        return Verdict("fail", f"{lost:.1%} of the others' requests were lost")
    open_still = sum(after is None for after in closed_after_s)
    latest = max((after for after in closed_after_s if after is not None), default=0.0)
    if open_still:
        return Verdict("partial", f"{open_still} of {len(closed_after_s)} slow callers are not closed")
    if latest > wanted_s + 3.0:
        return Verdict("partial", f"slow callers are closed after {latest:.0f} s (limit {wanted_s:g} s)")
    return PASS


def slow_readers(streams, rss_growth_kib, sent_whole, ended, window_s):
    """Callers that do not read: little memory each, the upstream is paused, and in the end they are let go."""
    each = rss_growth_kib / streams
    verdicts = []
    if each > 256:
        verdicts.append(Verdict("fail" if each > 5 * 1024 else "partial", f"{each:.0f} KiB of memory a stream"))
    if sent_whole:
        verdicts.append(Verdict("partial", f"{sent_whole} upstreams were not paused"))
    if ended < streams:
        verdicts.append(Verdict("partial", f"{streams - ended} of {streams} are held for more than {window_s:.0f} s"))
    return worst(verdicts or [PASS])


def bounded(grown_kib, most_kib):
    if grown_kib > most_kib:
        return Verdict("fail" if grown_kib > 8 * most_kib else "partial", f"memory grew by {grown_kib / 1024:.0f} MiB")
    return PASS


def killed(calls, replica, killed_at, dead_at, back_s, back_at, back_within_s=2.0):
    """`calls`: of each its attempts, (which replica, answer); the last one counts. One replica was killed between two
    moments: what it had in flight is lost and its callers see that, nothing else is, and it comes back."""
    ends = [attempts[-1] for attempts in calls]
    held = [
        answer for where, answer in ends
        if where == replica and answer.end != "unreachable" and answer.t_start <= dead_at and answer.t_end >= killed_at
    ]  # fmt: skip
    lost = [answer for _, answer in ends if kind(answer) != "whole"]
    others = [answer for answer in lost if not any(answer is one for one in held)]
    silent = [answer for answer in lost if kind(answer) not in ("cut", "dropped")]
    after = [answer for where, answer in ends if where == replica and answer.t_start > back_at]
    shown = f"{len(lost)} lost of {len(held)} in flight there"
    verdicts = []
    if not held or not after:
        verdicts.append(Verdict("fail", "nothing was in flight there, or nothing came afterwards"))
    if silent:
        verdicts.append(Verdict("fail", f"{len(silent)} calls do not look lost: {end_of(silent[0]).reason}"))
    if others:
        verdicts.append(Verdict("fail", f"{len(others)} others lost: {end_of(others[0]).reason}"))
    if back_s is None or back_s > back_within_s:
        took = "not at all" if back_s is None else f"only {back_s:.1f} s"
        verdicts.append(Verdict("partial", f"back {took} after its start"))
    return worst(verdicts).of(shown) if verdicts else Verdict("pass", f"{shown}, back after {back_s:.2f} s")


def held_streams(answers, grown_kib, cores, most_kib, most_cores):
    """Many streams that say little: none is lost, each takes little memory, all together little of a core."""
    each = grown_kib / max(1, len(answers))
    shown = f"{each:.0f} KiB a stream, {cores:.0%} of a core for {len(answers)} streams"
    lost = [answer for answer in answers if not is_counted_whole(answer)]
    if lost:
        return Verdict("fail", f"{len(lost)} of {len(answers)} streams were lost; {shown}")
    if each > most_kib or cores > most_cores:
        return Verdict("partial", f"{shown} (limits {most_kib} KiB, {most_cores:.0%})")
    return Verdict("pass", shown)
