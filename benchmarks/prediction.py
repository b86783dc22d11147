"""Is a step at a length that was not run what the fit says? Short contexts predict a long one, which is measured too.

    scripts/bench prediction PACKAGE [--run 128,256,512] [--predict 900] [--new-tokens 32] [--runs 6] [--json]

All lengths run in the same rounds; the fit sees the short ones only. Exit status 3 if the prediction is not within 10%
of the measured median.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from runtime.benchmark.command import LOADS_OF_A_SWEEP
from runtime.benchmark.engine import Placement
from runtime.benchmark.limits import StepModel
from runtime.benchmark.report import receipt_line
from runtime.benchmark.rounds import Contender, measure
from runtime.benchmark.workload import Workload
from runtime.command_line import CommandLineParser, run_command, whole_number, whole_numbers
from runtime.errors import VerificationError
from runtime.package import open_package
from runtime.processor import available_processors

AGREEMENT = 0.10


def check_prediction(options: argparse.Namespace) -> int:
    contender = Contender(
        options.package.resolve().name, Placement(package=open_package(options.package), threads=available_processors())
    )
    workloads = [
        Workload(prompt_tokens=length, new_tokens=options.new_tokens, batch=1)
        for length in (*options.run, options.predict)
    ]
    measured = measure(
        [contender], workloads, runs=options.runs, loads=min(options.runs, LOADS_OF_A_SWEEP), warmup=1, load_runs=0
    )
    *short, _long = measured.runs[0]
    row = measured.rows[0][-1]
    assert row.itl_ms is not None, "two new tokens or more"
    model = StepModel.fit([[run.times for run in runs] for runs in short])
    middle = options.predict + (options.new_tokens - 1) // 2  # tokens behind which the median step stands
    prediction = model.predict(middle, 1)
    off = prediction.itl_ms / row.itl_ms.p50 - 1
    result = {
        "package": contender.name,
        "run": options.run,
        "past_tokens": middle,
        "predicted_ms": prediction.itl_ms,
        "low": prediction.low,
        "high": prediction.high,
        "warnings": prediction.warnings,
        "measured_ms": row.itl_ms.p50,
        "off": off,
    }
    if options.json:
        print(json.dumps(result | {"receipt": measured.receipt}))
    else:
        print(
            f"{contender.name}, behind {middle} tokens: predicted {prediction.itl_ms:.2f} ms ({prediction.low:.2f} to "
            f"{prediction.high:.2f}) from prompts of {', '.join(map(str, options.run))}, measured {row.itl_ms.p50:.2f} "
            f"ms: {off:+.1%}{''.join(f'; {warning}' for warning in prediction.warnings)}"
        )
        print(receipt_line(measured.receipt))
    if abs(off) > AGREEMENT:
        raise VerificationError(f"the prediction is off by {off:+.1%}, expected at most {AGREEMENT:.0%}")
    return 0


def main() -> int:
    parser = CommandLineParser(prog="prediction", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path)
    parser.add_argument("--run", type=whole_numbers, default=[128, 256, 512])
    parser.add_argument("--predict", type=whole_number(1), default=900)
    parser.add_argument("--new-tokens", type=whole_number(2), default=32)
    parser.add_argument("--runs", type=whole_number(3), default=6)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    return run_command(lambda: check_prediction(options))


if __name__ == "__main__":
    sys.exit(main())
