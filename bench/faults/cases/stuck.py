"""R05: connections that cannot be made, and backends that take a request and say nothing."""

import judge
from case import case, route, verdicts
from fleet import black_hole


@case(
    "R05", "black-holed SYN; accepts, then silence",
    route("r05-hole", "hole", "beta", connect_s=1.0), route("r05-silent", connect_s=1.0, first_byte_s=2.0, total_s=8.0),
    alone=True,
)  # fmt: skip
async def r05(ctx):
    found = []
    if "r05-hole" in ctx.routes:
        with black_hole(ctx.hole_port):
            for number in range(4):
                answer = await ctx.call("r05-hole", stream=number % 2 == 0)
                ctx.keep("black hole", answer)
                # The connect limit, and a second for everything else.
                found.append(judge.within(answer, 2.0, judge.end_of(answer)).of("black hole"))
    await ctx.fleet.alpha.behave({"before": "silence"})
    for stream in (True, False) if "r05-silent" in ctx.routes else ():
        answer = await ctx.hit("r05-silent", stream=stream)
        ctx.keep("silence", answer)
        log = await ctx.fleet.log()
        verdict = judge.silent_route(log, answer, 2.0)
        billed = sum(record["id"] == answer.id and record["end"] == "done" for record in log)
        if verdict.grade == "pass" and billed != 1:
            verdict = judge.Verdict("partial", f"{billed} upstreams made the same answer")
        found.append(verdict.of("silence"))
    return verdicts(*found)
