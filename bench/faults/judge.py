"""Grades, from what callers and upstreams saw and nothing else. Pure: no clock, no socket.

pass: the expected outcome. partial: answered, but not as it should be. safe: a clear error in time, nothing lost or
leaked. fail: a hang, a cut answer that looks whole, a wrong one, harm to others."""

import json
from dataclasses import dataclass

from client import WORDS, text_of

ORDER = ("fail", "safe", "partial", "pass")


@dataclass(frozen=True)
class Verdict:
    grade: str
    reason: str = ""

    def of(self, probe):
        """The same, with the probe's name before the reason."""
        if self.grade == "pass" and not self.reason:
            return self
        return Verdict(self.grade, f"{probe}: {self.reason}" if self.reason else probe)


PASS = Verdict("pass")


def worst(verdicts):
    """The grade of a case is that of its worst probe; the reasons of all that share it are kept."""
    verdicts = list(verdicts)
    if not verdicts:
        return Verdict("fail", "no probe was answered")
    grade = min((verdict.grade for verdict in verdicts), key=ORDER.index)
    reasons = []
    for verdict in verdicts:
        if verdict.grade == grade and verdict.reason and verdict.reason not in reasons:
            reasons.append(verdict.reason)
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return Verdict(grade, shown)


def kind(answer, text=None):
    """What an answer is to its caller, in one word. `text` is what was to be said: by default as many words as the
    answer's own usage counts."""
    if text is None:
        counted = (answer.usage or {}).get("completion_tokens")
        # A continued answer counts only what the second upstream said.
        text = text_of(counted if isinstance(counted, int) and answer.text != text_of(WORDS) else WORDS)
    if answer.end == "timeout":
        return "hang"
    if answer.status is None:
        return "dropped"
    if answer.status >= 400:
        return "error"
    if answer.error is not None:
        return "error_event"
    if answer.end != "complete":
        return "cut"
    if not answer.stream and not answer.text and answer.garbled:
        return "unreadable"
    if answer.text != text:
        return "truncated" if text.startswith(answer.text) else "wrong"
    if answer.stream and answer.finish is None:
        return "truncated"
    return "whole"


def _said(answer):
    error = answer.error if isinstance(answer.error, dict) else {"message": answer.error}
    inner = error.get("error") if isinstance(error.get("error"), dict) else error
    return str(inner.get("code") or inner.get("type") or inner.get("message") or "")[:60]


def end_of(answer, text=None):
    """The verdict on one answer where a whole one is wanted and a clear error is safe."""
    seen = kind(answer, text)
    at = f" after {answer.wall_s:.1f} s"
    if seen == "whole":
        return PASS
    if seen == "error":
        return Verdict("safe", f"status {answer.status} {_said(answer)}{at}")
    if seen == "error_event":
        return Verdict("safe", f"error event {_said(answer)} after {answer.pieces} tokens{at}")
    if seen == "cut":
        return Verdict("safe", f"cut after {answer.pieces} tokens, seen on the connection only{at}")
    if seen == "dropped":
        return Verdict("safe", f"connection closed without an answer{at}")
    if seen == "unreadable":
        return Verdict("partial", f"status {answer.status} with a body that is not JSON")
    if seen == "hang":
        return Verdict("fail", f"no end{at}, {answer.pieces} tokens")
    if seen == "truncated":
        return Verdict("fail", f"cut after {answer.pieces} tokens and looks like an end{at}")
    return Verdict("fail", f"wrong text, {len(answer.text)} characters{at}")


def stalled(answer, most_s):
    """A stream that stands still for longer than it may: nothing but an error event says so, and it says so in time."""
    verdict = end_of(answer)
    if verdict.grade == "safe" and answer.wall_s > most_s:
        return Verdict("safe", f"{verdict.reason}, with the upstream rather than at the limit")
    return PASS if kind(answer) == "error_event" else verdict


def attempts(log, answer, upstream):
    """The times of this request's attempts at an upstream."""
    return [record["t"] for record in log if record["id"] == answer.id and record["upstream"] == upstream]


def not_hammered(log, answer, upstream, within_s=3.0, most=4, in_all=6):
    times = attempts(log, answer, upstream)
    burst = sum(time <= times[0] + within_s for time in times) if times else 0
    if burst > most or len(times) > in_all:
        return Verdict("fail", f"{len(times)} attempts at what fails, {burst} within {within_s:g} s")
    return PASS


def retry_after_honoured(log, answer, upstream, wait_s):
    times = attempts(log, answer, upstream)
    if len(times) > 1 and times[1] - times[0] < wait_s:
        return Verdict("partial", f"asked again after {times[1] - times[0]:.1f} s")
    return PASS


def within(answer, limit_s, verdict, grade="partial"):
    """A pass that took longer than the limit is no pass."""
    if verdict.grade == "pass" and answer.wall_s > limit_s:
        return Verdict(grade, f"answered only after {answer.wall_s:.1f} s (limit {limit_s:g} s)")
    return verdict


def silent_route(log, answer, first_byte_s):
    """An upstream that says nothing: on to the next one after the limit, without asking the silent one again."""
    verdict = within(answer, first_byte_s + 2.0, end_of(answer))
    tries = len(attempts(log, answer, "alpha"))
    if verdict.grade == "pass" and tries > 1:
        return Verdict("partial", f"{tries} attempts at the silent upstream")
    return verdict


def malformed(answer, is_damaged=False):
    """An unreadable event between good ones; where even its bytes are damaged, an error is as good as to leave it out."""
    verdict = cut_stream(answer) if is_damaged else end_of(answer)
    passed_on = answer.garbled or answer.bad_utf8 or "\ufffd" in answer.text
    if passed_on and answer.finish == "stop" and verdict.grade in ("pass", "fail"):
        return Verdict("partial", "the unreadable event was passed on: strict callers break at it")
    return verdict


def no_done(answer, upstream_end):
    verdict = end_of(answer)
    if verdict.grade == "pass" and answer.t_end - upstream_end > 2.0:
        return Verdict("partial", f"ended {answer.t_end - upstream_end:.1f} s after the upstream")
    if verdict.grade == "pass" and answer.stream and not answer.usage:
        return Verdict("partial", "no usage")
    if verdict.grade == "safe" and answer.text == text_of(WORDS) and answer.finish == "stop":
        return Verdict("partial", f"a whole answer was followed by an error: {_said(answer)}")
    return verdict


def context_length(log, answer):
    tries = len(attempts(log, answer, "alpha"))
    if tries > 1:
        return Verdict("fail", f"{tries} attempts with a prompt that cannot fit")
    return end_of(answer)


def content_filter(log, answer):
    tries = len(attempts(log, answer, "alpha"))
    if tries > 1:
        return Verdict("fail", f"{tries} attempts with a prompt that was rejected")
    if kind(answer) == "whole":
        return Verdict("partial", "another upstream was asked to answer what the first one rejected")
    if kind(answer) != "error":
        return end_of(answer)
    told = answer.body.decode(errors="replace")
    if "content_policy_violation" not in told and "content filter" not in told:
        return Verdict("safe", f"status {answer.status}, the provider's reason is lost")
    if answer.status >= 500:
        return Verdict("safe", f"the caller's mistake is reported as {answer.status}")
    return PASS


def prefill(answer):
    """The cut stream's fallback refuses to continue; its refusal must not hide what happened."""
    if answer.error is not None and "prefill" in str(answer.error):
        return Verdict("fail", "the fallback's refusal hides the cut")
    return end_of(answer)


def cut_stream(answer):
    """A stream cut after its first token: an error in the caller's protocol, or the whole answer."""
    verdict = end_of(answer)
    seen = kind(answer)
    if seen == "error_event":
        if answer.done or answer.finish == "stop":
            return Verdict("partial", "an error event, but a normal end as well")
        return PASS
    if seen == "truncated" and answer.finish == "abort":
        return Verdict("partial", "finish_reason abort was passed on as an end")
    return verdict


def flapping(answers, log, down_until, back_within_s):
    """Served while the first choice is down; the first choice used again once it is back."""
    verdicts = [end_of(answer) for answer in answers]
    back = [
        record["t"] - down_until
        for record in log
        if record["upstream"] == "alpha" and record["t"] >= down_until and record["end"] == "done"
    ]
    if not back:
        verdicts.append(Verdict("fail", "the first choice was not used again"))
    elif back[0] > back_within_s:
        verdicts.append(Verdict("partial", f"the first choice was used again after {back[0]:.1f} s"))
    return worst(verdicts)


def accounting(answer, tokens_by_backend=None):
    """After a failover the answer names the model that made it, and only that one is charged. `tokens_by_backend`
    is the subject's own count, where it has one."""
    verdict = end_of(answer)
    if verdict.grade != "pass":
        return verdict
    if answer.model != "beta-model":
        return Verdict("partial", f"reports the model {answer.model}, beta-model answered")
    if (answer.usage or {}).get("completion_tokens") != WORDS:
        return Verdict("partial", f"usage is {answer.usage}")
    wrong = {name: count for name, count in (tokens_by_backend or {}).items() if "alpha" in name and count}
    return Verdict("fail", f"charged to what failed: {wrong}") if wrong else PASS


def _smuggled(seen):
    """What the upstream saw that it must not see."""
    if any(record["id"] == "hidden" for record in seen):
        return Verdict("fail", "the upstream saw the hidden request")
    if len(seen) > 1:
        return Verdict("fail", f"the upstream saw {len(seen)} requests")
    damaged = [record for record in seen if record["id"] != "visible"]
    if damaged:
        return Verdict("fail", f"the upstream saw another request: {json.dumps(damaged[0]['head'][:80])}")
    return None


def smuggled(status, how, seen):
    """`seen`: the upstream's view of bytes that two readers may read differently. They are to be refused."""
    if (bad := _smuggled(seen)) is not None:
        return bad
    if status is not None and 400 <= status < 500 or status == 501:
        return PASS
    if status is None and how in ("closed", "reset"):
        return Verdict("safe", "closed without a status")
    if status is None:
        return Verdict("partial", "left waiting")
    if status >= 500:
        return Verdict("partial", f"answered {status}")
    return Verdict("safe", f"answered {status}; the upstream saw one request, in one reading")


def smuggled_h2(status, how, seen, never, following):
    """The same over HTTP/2, where to end the stream or the connection is a refusal as clear as a status (RFC 9113,
    8.1.1). `never` is what no head at the upstream may have; `following` is the next good request's answer."""
    if (bad := _smuggled(seen)) is not None:
        return bad
    if any(never.search(record["head"]) for record in seen):
        return Verdict("fail", "the upstream saw what the header held")
    if kind(following) != "whole":
        return Verdict("fail", f"the next good request: {end_of(following).reason}")
    if status is None and how in ("closed", "reset"):
        return PASS
    return smuggled(status, how, seen)


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def share_lost(answers):
    """Of answers that should be whole: how many are not."""
    return sum(kind(answer) != "whole" for answer in answers) / max(1, len(answers))


def clean_pct(answers):
    return 100.0 * (1.0 - share_lost(answers)) if answers else 100.0
