"""`python -m dapo_megatron.reward.worker RULE TIMEOUT_SECONDS` is the process behind `pool.GradingPool`.

It reads one line of JSON per chunk, [[response, answer], ...], and writes one line per item, [correct, extracted], as
soon as it is graded; a first line says that it is ready. It ends with its input, that is, with its parent process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import cast, get_args

from dapo_megatron.reward.math import Rule, grade

MEMORY_BYTES = 2 << 30
"""Address space of a worker. Sympy on a tower of powers would otherwise take the machine's."""

ORPHAN_GRACE_SECONDS = 1.0
"""The pool kills at the time limit; a worker without a pool any more ends itself this much later."""


def main(rule: Rule, timeout_seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    grade("Answer: 1", "1", rule)  # does the imports
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        for response, answer in json.loads(line):
            # SIGALRM keeps its default action: the kernel ends the process, also amid a long operation in C.
            signal.setitimer(signal.ITIMER_REAL, timeout_seconds + ORPHAN_GRACE_SECONDS)
            result = grade(response, answer, rule)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps([result.correct, result.extracted]), file=answers, flush=True)


if __name__ == "__main__":
    _, rule, timeout_seconds = sys.argv
    assert rule in get_args(Rule)
    main(cast(Rule, rule), float(timeout_seconds))
