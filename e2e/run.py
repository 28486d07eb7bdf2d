"""Runs user stories one after the other against the cluster of $KUBECONFIG.

A story is a module in stories/ with `run(cluster)`; it raises Failed, or Skipped with the reason. What a story makes
lives in a namespace of its own, which goes away with it; on failure the namespace's state is printed first."""

import importlib
import sys
import time
import traceback

from client import Failed
from cluster import Cluster, Skipped

DEFAULT = ["walk", "scale", "foreign", "failover", "keys", "budget", "absence", "bad_input"]
PROOFS = ["at_rest", "real_engine", "rolling_restart"]


def main(names):
    names = [name.replace(" ", "_").replace("-", "_") for name in names] or DEFAULT
    if unknown := [name for name in names if name not in DEFAULT + PROOFS]:
        sys.exit(f"e2e: no story {', '.join(unknown)}: there are {', '.join(DEFAULT + PROOFS)}")
    cluster = Cluster()
    cluster.install()
    results = {}
    for name in names:
        story = importlib.import_module(f"stories.{name}")
        print(f"e2e: {name}: {story.__doc__.strip().splitlines()[0]}", flush=True)
        start = time.monotonic()
        own = cluster.story(name)
        try:
            story.run(own)
            results[name] = "passed"
            detail = ""
        except Skipped as reason:
            results[name], detail = "skipped", f": {reason}"
        except Exception as error:  # a story may fail in any way; the others still run
            results[name], detail = "failed", f": {error}"
            if not isinstance(error, Failed):
                traceback.print_exc()
            cluster.describe(own.namespace)
        finally:
            cluster.clean(own.namespace)
        print(f"e2e: {name}: {results[name]} in {time.monotonic() - start:.0f} s{detail}", flush=True)
    count = {outcome: sum(value == outcome for value in results.values()) for outcome in ("passed", "failed", "skipped")}
    print(
        f"e2e: passed={count['passed']} failed={count['failed']} skipped={count['skipped']} of={len(names)}", flush=True
    )
    sys.exit(1 if count["failed"] else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
