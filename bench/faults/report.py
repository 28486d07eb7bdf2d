"""What a run says: a line for each case, a table for the docs, raw results, and the last line."""

import datetime
from dataclasses import dataclass

import judge

SHORT = {"pass": "pass", "partial": "partial", "safe": "safe", "fail": "FAIL", "none": "–"}
PEERS = ("litellm", "portkey", "vllm_router", "envoy")
SHOWN = {
    "penstock": "Penstock", "litellm": "LiteLLM", "portkey": "Portkey", "vllm_router": "vllm-router", "envoy": "Envoy",
}  # fmt: skip
CLEAN_TARGET_PCT = 99.9
# Faults that nothing can be made of but a clear error, unless a rescue of the stream was asked for.
MAY_BE_SAFE = ("S08", "S14")
PREFACE = (
    "Each case has clean traffic before, beside and after its fault, and the same judge for all: **pass** is the "
    "expected outcome, **partial** an answer that is not as it should be, **safe** a clear error in time with nothing "
    "lost, **fail** a hang, a cut answer that looks whole, a wrong one, or harm to others. The worst probe of a case "
    "decides. S01–S16 are failoverbench's faults. A dash: the case makes no sense there, or could not run; the list "
    "below the table says which."
)


@dataclass
class Facts:
    versions: dict
    clean: dict
    seconds: float
    missing: dict
    ours: str


def clean_pct(answers):
    return {"sent": len(answers), "pct": round(judge.clean_pct(answers), 3)}


def is_open(result):
    """Whether a case is still to be played: it could not be, for another reason than that it makes no sense."""
    return result is None or (result["grade"] == "none" and not result.get("unfit", False))


def together(before, facts):
    """The facts of a run and of the one that it goes on with."""

    def clean(name):
        parts = [part for part in (before["clean"].get(name), facts.clean.get(name)) if part]
        sent = sum(part["sent"] for part in parts)
        answered = sum(part["sent"] * part["pct"] for part in parts)
        return {"sent": sent, "pct": round(answered / sent, 3) if sent else 100.0}

    names = {**before["clean"], **facts.clean}
    return Facts(
        versions={**before["versions"], **facts.versions},
        clean={name: clean(name) for name in names},
        seconds=before["seconds"] + facts.seconds, missing={**before["missing"], **facts.missing}, ours=facts.ours,
    )  # fmt: skip


def line(case, results, ours):
    """One case: our grade and why, then the peers' grades."""
    mine = results.get(ours)
    others = " ".join(f"{name}={SHORT[results[name]['grade']]}" for name in PEERS if name in results)
    if mine:
        reason = f" ({mine['reason']})" if mine["reason"] else ""
        print(f"faults: {case.id} {case.title}: {SHORT[mine['grade']]}{reason} {others}".rstrip(), flush=True)
    else:
        print(f"faults: {case.id} {case.title}: {others}", flush=True)


def counted(results, subject):
    grades = [by[subject]["grade"] for by in results.values() if subject in by]
    return {grade: grades.count(grade) for grade in ("pass", "partial", "safe", "fail", "none")}


def raw(results, facts):
    return {
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": facts.versions, "clean": facts.clean, "seconds": round(facts.seconds, 1),
        "missing": facts.missing, "cases": results,
    }  # fmt: skip


def _cell(result):
    if result is None:
        return ""
    return {"none": "–", "fail": "**fail**"}.get(result["grade"], result["grade"])


def markdown(cases, results, facts):
    """A table, then why each grade that is not a pass is what it is."""
    names = [name for name in (facts.ours, *PEERS) if name in facts.versions]
    others = ", ".join(SHOWN[name] for name in names if name != facts.ours)
    head = [f"{SHOWN[name]} {facts.versions[name]}" for name in names]
    lines = [
        PREFACE, "",
        f"Configurations: `bench/faults/subjects/`, one file for each of {others or 'them'}.", "",
        f"| case | {' | '.join(head)} |", "|---|" + "---|" * len(names),
        *(
            f"| {case.id} {case.title} | "
            + " | ".join(_cell(results.get(case.id, {}).get(name)) for name in names) + " |"
            for case in cases
        ),
        "| pass / partial / safe / fail | " + " | ".join(
            "{pass} / {partial} / {safe} / {fail}".format(**counted(results, name)) for name in names
        ) + " |",
        "| clean traffic answered | " + " | ".join(_share(facts.clean.get(name)) for name in names) + " |",
        "", "What is not a pass, and why:", "",
    ]  # fmt: skip
    for case in cases:
        for name in names:
            result = results.get(case.id, {}).get(name)
            if result and result["grade"] != "pass" and result["reason"]:
                reason = result["reason"].replace("\n", " ")
                lines.append(f"- {case.id} {SHOWN[name]}, {SHORT[result['grade']].lower()}: {reason}")
    return "\n".join(lines) + "\n"


def _share(clean):
    return f"{clean['pct']:.2f} % of {clean['sent']}" if clean and clean["sent"] else "–"


def last_line(results, facts):
    mine = counted(results, facts.ours)
    # All of them: a case of ours that could not run is no reason to count one less.
    of = sum(mine.values())
    clean = facts.clean.get(facts.ours, {"pct": 100.0})["pct"]
    shown = []
    for name in PEERS:
        if name in facts.versions:
            theirs = counted(results, name)
            shown.append(f"{name}={theirs['pass']}/{sum(theirs.values()) - theirs['none']}")
        else:
            shown.append(f"{name}=-")
    grades = " ".join(f"{grade}={mine[grade]}" for grade in ("pass", "safe", "fail"))
    text = f"faults: {grades} of={of} clean_pct={clean:.2f} {' '.join(shown)}"
    failed = bool(missed(results, facts.ours)) or clean < CLEAN_TARGET_PCT
    return text, int(failed and facts.ours in facts.versions)


def missed(results, ours):
    """Our cases that ended otherwise than they have to. One that could not run has not been passed, unless its own
    table says that it makes no sense for us."""

    def is_met(case, result):
        if result["grade"] == "none":
            return result.get("unfit", False)
        return result["grade"] == "pass" or (result["grade"] == "safe" and case in MAY_BE_SAFE)

    return [case for case, by in results.items() if ours in by and not is_met(case, by[ours])]
